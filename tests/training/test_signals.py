from __future__ import annotations

import os
import signal
import threading
from dataclasses import replace

import pytest

from mmdiff.training import state
from mmdiff.training.loop import fit
from mmdiff.training.signals import StopFlag


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_r17_a_signal_in_the_middle_of_a_step_saves_that_step(toy, tmp_path, name):
    number = getattr(signal, name)

    def objective(model, batch, generator):
        if batch.keys[0] == "sample-24":
            os.kill(os.getpid(), number)
        return toy.objective(model, batch, generator)

    before = signal.getsignal(number)
    config = replace(toy.CONFIG, samples=60, accumulate=1)
    report = fit(toy.Net(), objective, toy.Loader(), config, tmp_path / "run", progress=False)
    assert report.stopped
    assert report.samples == 28
    assert state.Checkpoints(tmp_path / "run", 2).latest().name == "step_0000000028"
    assert signal.getsignal(number) is before
    report = fit(toy.Net(), toy.objective, toy.Loader(), config, tmp_path / "run", resume=True, progress=False)
    assert not report.stopped
    assert report.samples == 60


def test_outside_the_main_thread_the_flag_does_nothing():
    before, raised = signal.getsignal(signal.SIGTERM), []

    def use():
        with StopFlag() as flag:
            raised.append(flag.raised)
            raised.append(signal.getsignal(signal.SIGTERM) is before)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert raised == [False, True]


def test_under_a_launcher_the_signal_that_it_passes_on_is_not_a_second_wish(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    left: list[int] = []
    monkeypatch.setattr(os, "_exit", left.append)
    with StopFlag() as flag:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flag.raised
        assert not left
        os.kill(os.getpid(), signal.SIGTERM)
    assert left == [128 + signal.SIGTERM]
