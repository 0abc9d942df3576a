"""The baseline of benchmarks/decode.py is the published algorithm: it passes the golden data itself."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.decode import main, published
from mmdiff.models.llada import LLaDA
from tests.helpers.golden import publish, root_of, tree_of

NAME, WEIGHTS = "llada_generate", "llada"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        cases = tree_of(metafunc.config, NAME)["cases"]
        metafunc.parametrize("case", [name for name, case in cases.items() if "forwards" in case])


@pytest.fixture(scope="module")
def golden(request, tmp_path_factory):
    root, tree = root_of(request.config, NAME), tree_of(request.config, NAME)
    config = tree_of(request.config, WEIGHTS)["variants"][tree["model_config"].rpartition(" ")[2]]
    folder = publish(tmp_path_factory.mktemp(NAME), config, root / tree["weights"])
    inputs, outputs = load_file(root / "inputs.safetensors"), load_file(root / "outputs.safetensors")
    return tree, LLaDA.from_pretrained(folder).eval(), inputs, outputs


@pytest.mark.parametrize("scores", [torch.float64, torch.float32])
def test_the_baseline_goes_through_the_published_canvases(golden, case, scores):
    tree, model, inputs, outputs = golden
    options = tree["cases"][case]
    words = {k: options[k] for k in ("gen_length", "block_length", "steps", "cfg_scale") if k in options}
    mask = inputs.get(f"{case}.attention_mask")
    run = published(
        model,
        inputs[f"{case}.prompt"],
        valid=None if mask is None else mask.bool(),
        never=(tree["eos_token_id"],) if options.get("logits_eos_inf") else (),
        last=(tree["eos_token_id"], tree["eot_token_id"]) if options.get("confidence_eos_eot_inf") else (),
        scores=scores,
        **words,
    )
    canvases = torch.stack([x.clone() for x in run])
    assert torch.equal(canvases, outputs[f"{case}.trace"][1:].long())
    assert torch.equal(canvases[-1], outputs[f"{case}.final"])


def test_processor_time_of_several_threads_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--clock", "cpu", "--threads", "2"])
    assert "--threads 1" in capsys.readouterr().err
