"""Our models inside other people's harnesses: each runs a task from local data through its own command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipelines.reader import iter_samples
from eval.harness.words import cut, generation_words, tokens_of
from mmdiff.errors import ConfigError
from mmdiff.images import decode, encode_png

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}


def rows(count: int) -> list[dict]:
    """Questions about real pictures with two choices each."""
    found = []
    for sample, _ in iter_samples("embedded:emoji/novel_concepts"):
        assert sample is not None
        info = sample.info()
        if info.get("color") and len(found) < count:
            picture = encode_png(decode(sample.image()))
            other = "blue" if info["color"] != "blue" else "red"
            question = "What is the main color?"
            row = {"question": question, "answer": info["color"], "choices": [info["color"], other], "picture": picture}
            found.append(row)
    return found


def run(words: list[str], home: Path, repository: Path) -> str:
    environment = {**os.environ, **OFFLINE, "HF_HOME": str(home), "PYTHONPATH": str(repository)}
    done = subprocess.run(
        [sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def results(folder: Path) -> dict:
    (path,) = [p for p in folder.rglob("*results*.json")]
    return json.loads(path.read_text())["results"]


@pytest.mark.slow
def test_lm_eval_runs_a_local_task_with_our_model(checkpoint: Path, tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("lm_eval")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    plain = [{k: v for k, v in row.items() if k != "picture"} for row in rows(4)]
    (tasks / "colors.json").write_text("\n".join(json.dumps(r) for r in plain))
    common = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {tasks / 'colors.json'}}}}}\ntest_split: test\n"
    )
    choice = 'doc_to_text: "{{question}}"\ndoc_to_target: 0\ndoc_to_choice: "{{choices}}"\n'
    (tasks / "a.yaml").write_text(f"task: local_choice\n{common}output_type: multiple_choice\n{choice}")
    written = 'doc_to_text: "{{question}}"\ndoc_to_target: "{{answer}}"\n'
    written += 'generation_kwargs: {until: ["\\n"], max_gen_toks: 4}\nmetric_list: [{metric: exact_match}]\n'
    (tasks / "b.yaml").write_text(f"task: local_words\n{common}output_type: generate_until\n{written}")
    words = ["-m", "eval.harness.lm", "run", "--model", "mmdiff", "--tasks", "local_choice,local_words"]
    words += ["--model_args", f"pretrained={checkpoint},samples=4", "--device", "cpu", "--include_path", str(tasks)]
    run([*words, "--output_path", str(tmp_path / "out")], tmp_path, repository)
    found = results(tmp_path / "out")
    assert 0 <= found["local_choice"]["acc,none"] <= 1
    assert "exact_match,none" in found["local_words"]


@pytest.mark.slow
def test_lmms_eval_runs_a_local_task_with_our_model(checkpoint: Path, tmp_path: Path, repository: Path) -> None:
    pytest.importorskip("lmms_eval")
    datasets = pytest.importorskip("datasets")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    columns = [{"question": r["question"], "answer": r["answer"], "image": {"bytes": r["picture"]}} for r in rows(4)]
    features = datasets.Features(
        {"question": datasets.Value("string"), "answer": datasets.Value("string"), "image": datasets.Image()}
    )
    datasets.Dataset.from_list(columns, features=features).to_parquet(str(tasks / "colors.parquet"))
    (tasks / "utils.py").write_text(
        "def visual(doc):\n    return [doc['image'].convert('RGB')]\n\n"
        "def text(doc, lmms_eval_specific_kwargs=None):\n    return doc['question']\n\n"
        "def judge(doc, results):\n    return {'exact': float(results[0] == doc['answer'])}\n"
    )
    (tasks / "local.yaml").write_text(
        "task: local_pictures\ndataset_path: parquet\n"
        f"dataset_kwargs: {{data_files: {{test: {tasks / 'colors.parquet'}}}}}\n"
        "test_split: test\noutput_type: generate_until\n"
        "doc_to_visual: !function utils.visual\ndoc_to_text: !function utils.text\ndoc_to_target: answer\n"
        "process_results: !function utils.judge\ngeneration_kwargs: {max_new_tokens: 4}\n"
        "metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]\n"
    )
    for style in ("plain", "llada-v"):
        words = ["-m", "lmms_eval", "--model", "mmdiff", "--tasks", "local_pictures", "--include_path", str(tasks)]
        words += ["--model_args", f"pretrained={checkpoint},device=cpu,style={style}", "--batch_size", "1"]
        run([*words, "--output_path", str(tmp_path / style)], tmp_path, repository)
        assert 0 <= results(tmp_path / style)["local_pictures"]["exact,none"] <= 1


def test_options_of_the_harnesses_in_our_words() -> None:
    given = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False, "num_beams": 1, "temperature": 0.0}
    assert generation_words(given, {}) == {"gen_length": 8, "temperature": 0.0}
    llada = {"gen_length": 2, "block_length": 2, "gen_steps": 2, "cfg": 0, "think_mode": "no_think"}
    words = generation_words({**llada, "max_new_tokens": 512}, {"threshold": 0.9})
    assert words == {"gen_length": 2, "block_length": 2, "steps": 2, "cfg_scale": 0, "threshold": 0.9}
    assert generation_words({"gen_length": 4}, {"gen_length": 2}) == {"gen_length": 4}
    assert generation_words({"steps": 4}, {"num_inference_steps": 2}) == {"num_inference_steps": 2}
    assert tokens_of("llada-v")["gen_length"] == 2
    with pytest.raises(ConfigError, match="plain, llada-v"):
        tokens_of("chatty")


def test_cutting_at_stop_texts() -> None:
    assert cut("red\nand blue", ["\n", "blue"]) == "red"
    assert cut("red", None) == "red"
    assert cut("a. b", ".") == "a"
