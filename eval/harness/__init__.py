"""Our models inside lm-evaluation-harness and lmms-eval, under the name ``mmdiff``.

Both come with ``pip install 'mmdiff[harness]'``, and nothing here is imported without them.

lmms-eval finds the model by itself (an entry point): ``python -m lmms_eval --model mmdiff --model_args
pretrained=PATH``. lm-evaluation-harness has no such door: ``python -m eval.harness.lm run --model mmdiff
--model_args pretrained=PATH`` is its own command after the name is registered.
"""
