"""The page of ``mmdiff ui``: what it does without a browser, and in one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mmdiff
from mmdiff.commands.ui import Studio, _growing, page
from mmdiff.errors import CheckpointError, ConfigError, MissingExtraError
from mmdiff.pipelines import Pipeline
from tests.helpers import lumina, mmada, tiny

BROWSER = shutil.which("chromium")


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return Pipeline(tiny.unified_checkpoint())


def test_answers_grow_to_what_the_model_says(pipeline):
    picture = tiny.picture(1)
    drafts = list(Studio(pipeline).ask(picture, "yes?", gen_length=8, preset="exact"))
    assert len(drafts) > 1
    assert drafts[-1] == pipeline.vision.ask(picture, "yes?", gen_length=8, preset="exact")


def test_a_conversation_keeps_what_was_said_and_shown(pipeline):
    studio, picture = Studio(pipeline), tiny.picture(1)
    first = list(studio.chat("what is it?", picture, [], gen_length=4))[-1]
    second = list(studio.chat("no?", None, first, gen_length=4))[-1]
    assert [m["role"] for m in second] == ["user", "assistant"] * 2
    assert second[:2] == first
    assert second[0]["content"][0]["image"] is picture


def test_a_drawing_fills_in_and_ends_as_the_generator_draws_it(pipeline):
    sketches = list(Studio(pipeline).draw("a red circle", 3, num_inference_steps=4))
    final = pipeline.images(prompts="a red circle", seeds=3, num_inference_steps=4).images[0]
    assert len(sketches) == 5
    assert sketches[-1].tobytes() == final.tobytes()
    grey = [sum(p == (128, 128, 128) for p in s.get_flattened_data()) for s in sketches]
    assert grey[0] > grey[1] > grey[2]
    assert {s.size for s in sketches} == {final.size}


@pytest.mark.parametrize("published", [lumina, mmada])
def test_a_network_that_reads_codes_shows_its_drawing_fill_in(published, tmp_path):
    """Lumina-DiMOO's rows end with an id of their own, and neither draws the grid of its tokenizer's own size."""
    studio = Studio(mmdiff.load(published.publish(tmp_path / "m"), device="cpu"))
    sketches = list(studio.draw("a red circle", 3, num_inference_steps=4))
    assert len(sketches) == 5
    assert len({s.size for s in sketches}) == 1
    grey = [sum(p == (128, 128, 128) for p in s.get_flattened_data()) for s in sketches]
    assert grey[0] > grey[1] > grey[2]


def test_what_cannot_be_done_is_said(pipeline):
    studio = Studio(pipeline)
    for results, message in [
        (studio.ask(None, "?"), "choose a picture"),
        (studio.ask(tiny.picture(0), " "), "ask something"),
        (studio.chat("", None, []), "say something"),
        (studio.draw(" "), "say what to draw"),
    ]:
        with pytest.raises(ConfigError, match=message):
            next(results)
    blind = tiny.llada_v_checkpoint()
    blind.model = blind.model.language
    assert "caption" not in Studio(Pipeline(blind)).can
    with pytest.raises(ConfigError, match="sees no pictures"):
        next(Studio(Pipeline(blind)).chat("a", tiny.picture(0), []))
    with pytest.raises(CheckpointError, match="text_image"):
        next(Studio(Pipeline(blind)).draw("a"))


def test_an_error_in_the_thread_comes_out():
    def work(show):
        show(1)
        raise ConfigError("no")

    results = _growing(work)
    assert next(results) == 1
    with pytest.raises(ConfigError, match="no"):
        next(results)


def test_without_gradio_the_command_that_installs_it_is_named(pipeline, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mmdiff\[ui\]'"):
        page(Studio(pipeline), "a")


class Browser:
    """Headless Chromium, told what to do through its debugging pipe."""

    def __init__(self, folder: Path, url: str) -> None:
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()

        def pipes() -> None:  # Chromium reads commands from 3 and writes answers to 4
            a, b = os.dup(to_read), os.dup(from_write)
            os.dup2(a, 3)
            os.dup2(b, 4)

        words = ["--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", f"--user-data-dir={folder}"]
        self.process = subprocess.Popen(
            [BROWSER, *words], close_fds=False, preexec_fn=pipes, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._buffer, self._number, self._session = b"", 0, None
        target = self.send("Target.createTarget", url=url)["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def send(self, method: str, **params: object) -> dict:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            while b"\0" not in self._buffer:
                self._buffer += os.read(self._from, 1 << 16)
            line, _, self._buffer = self._buffer.partition(b"\0")
            answer = json.loads(line)
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def run(self, code: str) -> object:
        return self.send("Runtime.evaluate", expression=code, returnByValue=True)["result"].get("value")

    def until(self, code: str, seconds: float = 90) -> object:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(code):
                return value
            time.sleep(0.2)
        raise TimeoutError(f"{code} never held; the page: {self.run('document.body.innerText')!r:.2000}")

    def press(self, label: str, role: str = "button") -> None:
        found = f"[...document.querySelectorAll('{role}')].find(b => b.innerText.trim() === '{label}')"
        self.until(f"!!({found})")
        self.run(f"({found}).click()")

    def upload(self, path: Path) -> None:
        self.until("!!document.querySelector('input[type=file]')")
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector="input[type=file]")["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def write(self, place: str, text: str) -> None:
        self.run(
            f"(() => {{ const t = document.querySelector('{place} textarea'); t.value = {json.dumps(text)};"
            "t.dispatchEvent(new Event('input', {bubbles: true})); })()"
        )


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None or importlib.util.find_spec("gradio") is None, reason="needs gradio and chromium")
def test_the_page_works_in_a_browser(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    tiny.picture(1).save(tmp_path / "a.png")
    log = (tmp_path / "log").open("w+")
    words = ["-m", "mmdiff", "ui", str(tmp_path / "model"), "--port", "0", "--device", "cpu"]
    server = subprocess.Popen([sys.executable, *words], stdout=log, stderr=log)
    browser = None
    try:
        end = time.monotonic() + 120
        while "http://" not in (said := (tmp_path / "log").read_text()):
            assert server.poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.3)
        browser = Browser(tmp_path / "browser", "http://" + said.partition("http://")[2].split()[0])
        browser.upload(tmp_path / "a.png")
        browser.until("[...document.querySelectorAll('img')].some(i => i.src.includes('a.png'))")
        browser.press("Caption")
        browser.until("document.querySelector('#answer textarea').value.length > 0")
        browser.press("Draw", "[role=tab]")
        browser.until("!!document.querySelector('#prompt textarea')")
        browser.write("#prompt", "a red circle")
        browser.run("[...document.querySelectorAll('button')].filter(b => b.innerText.trim() === 'Draw').pop().click()")
        browser.until("!!document.querySelector('#drawing img')")
        browser.press("Chat", "[role=tab]")
        browser.until("!!document.querySelector('#message textarea')")
        browser.write("#message", "hello there")
        browser.press("Send")
        browser.until("document.body.innerText.includes('hello there')")
    finally:
        server.terminate()
        if browser is not None:
            browser.process.terminate()
            browser.process.wait(20)
        server.wait(20)
        log.close()
