"""The commands of the page about clusters: the batch script runs, with stand-ins for what SLURM brings."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from mmdiff.commands.recipe import RunConfig
from mmdiff.commands.train import load_config

PAGE = (Path(__file__).parent.parent / "docs" / "cluster.md").read_text(encoding="utf-8")
[SCRIPT] = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
SHELL = re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)
BASH = shutil.which("bash") or "bash"

STAND_INS = {
    "scontrol": '#!/bin/bash\necho "$@" >> scontrol.log\n[ "$1" = show ] && printf "node7\\nnode8\\n" || true\n',
    "srun": """#!/bin/bash
code=0
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank SLURM_NTASKS=2 "$@"
  one=$?
  [ $one -gt $code ] && code=$one
done
exit $code
""",
    "mmdiff": """#!/bin/bash
echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $*" >> mmdiff.log
exit $CODE
""",
}


@pytest.mark.parametrize("text", [SCRIPT, *SHELL], ids=lambda text: text.split("\n")[0][:40])
def test_commands_are_shell(text):
    done = subprocess.run([BASH, "-n"], input=text, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("code", "requeued"), [(75, True), (0, False), (3, False)])
def test_the_batch_script_starts_every_rank_and_is_requeued_only_when_it_was_stopped(tmp_path, code, requeued):
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_CPUS_PER_TASK": "8", "CODE": str(code)}
    env = {**os.environ, **slurm, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [BASH, "-c", SCRIPT, "train.sbatch", "a recipe.yaml", "out=/x"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    ranks = (tmp_path / "mmdiff.log").read_text().splitlines()
    assert ranks == [f"{rank} {rank} 2 node7 20041 train a recipe.yaml out=/x --resume" for rank in (0, 1)]
    assert ("requeue 41" in (tmp_path / "scontrol.log").read_text()) == requeued


def test_the_keys_of_the_page_exist():
    keys = [key for text in SHELL for key in re.findall(r"\btrain\.[\w.]+=\S+", text)]
    assert len(keys) >= 3
    assert isinstance(load_config("demo/image_tokenizer.yaml", keys), RunConfig)
