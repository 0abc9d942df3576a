"""The benchmark of several processes: what it concludes, and (slow) that it runs and both ways learn the same."""

from __future__ import annotations

import re

import pytest

from benchmarks.processes import Runs, main, report


def test_efficiencies_are_ratios_of_medians():
    one = Runs([10.0, 12.0, 11.0], [0.02], [1.0, 0.5])
    two = Runs([16.0, 40.0, 17.6], [0.025], [1.0, 0.5 + 1e-6])
    text = "\n".join(report(one, two, 2, "ddp"))
    assert "ratio 1.60, efficiency 80%" in text
    assert "by the work: efficiency 80%" in text
    assert "losses differ by at most 1.0e-06" in text


def test_runs_too_short_to_measure_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--steps", "8"])
    assert "at least 12" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_learn_what_one_does(strategy, capsys):
    main(["--steps", "12", "--batch", "8", "--rounds", "1", "--strategy", strategy])
    [apart] = re.findall(r"differ by at most (\S+)", capsys.readouterr().out)
    assert float(apart) < 1e-5
