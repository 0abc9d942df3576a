"""``mmdiff ui``: one page in the browser for captions, questions, conversation and drawing, filled in as it is written.

`Studio` does what the page asks for and knows no page; `page` puts gradio's widgets around it.
"""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from mmdiff.commands.options import Adapter, Device, DeviceMap, Dtype, Model, Quantize
from mmdiff.errors import ConfigError, MissingExtraError, MmdiffError

__all__ = ["Studio", "page", "ui"]

_GREY = 128


def ui(
    model: Model,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 7860,
    device: Device = None,
    dtype: Dtype = None,
    quantize: Quantize = None,
    adapter: Adapter = None,
    device_map: DeviceMap = None,
) -> None:
    """Open a page in the browser for a model: caption, ask, chat and draw; the canvas fills in as you watch."""
    from mmdiff.pipelines import load

    _gradio()
    pipeline = load(model, device=device, dtype=dtype, quantize=quantize, adapter=adapter, device_map=device_map)
    # Nothing is shared with a relay, and only the page's own files are served.
    page(Studio(pipeline), model).queue().launch(server_name=host, server_port=port or None, share=False)


class Studio:
    """What the page can ask of a model; everything is shown as it grows.

    Args:
        pipeline: A loaded checkpoint.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.can: frozenset[str] = pipeline.capabilities
        self._talker = pipeline.vision if "caption" in self.can else pipeline.text

    def ask(self, picture: Any, question: str, **words: Any) -> Iterator[str]:
        """Drafts of the answer to a question about a picture, the last one final.

        Raises:
            ConfigError: No picture, or no question.
        """
        if picture is None:
            raise ConfigError("choose a picture first")
        if not question.strip():
            raise ConfigError("ask something")
        yield from self._say([_message(question, [picture])], words)

    def chat(
        self, said: str, picture: Any, history: Sequence[dict[str, Any]], **words: Any
    ) -> Iterator[list[dict[str, Any]]]:
        """The conversation with a new question and growing answer.

        Args:
            said: What the user says.
            picture: Shown with it; None for none.
            history: ``{"role", "content"}``, the content as the model takes it.
            **words: Options of generation.

        Yields:
            The history with what is new.

        Raises:
            ConfigError: Nothing was said, or a picture for a model that sees none.
        """
        if not said.strip():
            raise ConfigError("say something")
        if picture is not None and "caption" not in self.can:
            raise ConfigError("this model sees no pictures")
        asked = [*history, _message(said, [] if picture is None else [picture])]
        for draft in self._say(asked, words):
            yield [*asked, {"role": "assistant", "content": draft or "…"}]

    def draw(self, prompt: str, seed: int = 0, **words: Any) -> Iterator[Any]:
        """The picture after every pass, cells that are not decided yet in grey; the last one is final.

        Raises:
            ConfigError: No prompt.
        """
        if not prompt.strip():
            raise ConfigError("say what to draw")
        painter = self.pipeline.images

        def paint(show: Callable[[Any], None]) -> Any:
            def passed(pipeline: Any, step: int, share: float, state: dict[str, Any]) -> None:
                show(self._sketch(state["tokens"]))

            # Half-drawn continuous tokens show nothing.
            watch = None if self.pipeline.checkpoint.layout.latents else passed
            return painter(prompts=prompt, seeds=int(seed), callback_on_step_end=watch, **words).images[0]

        yield from _growing(paint)

    def _say(self, messages: Sequence[dict[str, Any]], words: dict[str, Any]) -> Iterator[str]:
        yield from self._talker.chat(messages, stream=True, **words)

    def _sketch(self, tokens: Any) -> Any:
        """A picture of codes of which some are still masked."""
        import torch
        from PIL import Image

        from mmdiff.images import to_uint8

        parts = self.pipeline.checkpoint
        shape, grid = parts.layout, math.isqrt(parts.layout.codes)
        drawn = (tokens[0] >= shape.code_offset) & (tokens[0] < shape.code_offset + shape.codebook)
        # Some networks end every row of codes with an id of its own.
        places = (drawn | (tokens[0] == shape.code_mask_id)).nonzero()[-shape.codes :, 0]
        codes, open_ = tokens[0, places] - shape.code_offset, ~drawn[places]
        with torch.no_grad():
            pixels = parts.image_tokenizer.decode(codes.masked_fill(open_, 0).view(1, grid, grid))
        cells = open_.view(1, 1, grid, grid).float()
        hidden = torch.nn.functional.interpolate(cells, pixels.shape[-2:])[0, 0] > 0
        array = to_uint8(pixels)[0].masked_fill(hidden[..., None], _GREY)
        return Image.fromarray(array.cpu().numpy())


def page(studio: Studio, name: str) -> Any:
    """The page, as gradio's Blocks: a tab for everything the checkpoint can do.

    Args:
        studio: Does the work.
        name: Of the model, for the title.

    Raises:
        MissingExtraError: gradio is not installed.
    """
    gr = _gradio()
    with gr.Blocks(title=f"mmdiff: {name}", analytics_enabled=False) as blocks:
        gr.Markdown(f"# {name}")
        with gr.Accordion("Options", open=False):
            length = gr.Slider(1, 512, value=_default(studio, "text", "gen_length", 128), step=1, label="gen_length")
            preset = gr.Radio(["exact", "fast", "turbo"], value="fast", label="preset")
        if "caption" in studio.can:
            with gr.Tab("Caption and ask"):
                _reading(gr, studio, length, preset)
        if "chat" in studio.can:
            with gr.Tab("Chat"):
                _talking(gr, studio, length, preset)
        if "text_image" in studio.can:
            with gr.Tab("Draw"):
                _drawing(gr, studio)
    return blocks


def _reading(gr: Any, studio: Studio, length: Any, preset: Any) -> None:
    from mmdiff.text import CAPTION_PROMPT

    with gr.Row():
        picture = gr.Image(type="pil", label="Picture", sources=["upload", "clipboard"])
        with gr.Column():
            question = gr.Textbox(label="Question", placeholder="What colour is it?")
            with gr.Row():
                ask, caption = gr.Button("Ask", variant="primary"), gr.Button("Caption")
            answer = gr.Textbox(label="Answer", lines=4, elem_id="answer")

    def told(image: Any, asked: str, tokens: int, speed: str) -> Iterator[str]:
        yield from _shown(gr, studio.ask(image, asked, gen_length=int(tokens), preset=speed))

    def described(image: Any, tokens: int, speed: str) -> Iterator[str]:
        yield from told(image, CAPTION_PROMPT, tokens, speed)

    _on(ask.click, told, [picture, question, length, preset], answer, "ask")
    _on(question.submit, told, [picture, question, length, preset], answer, None)
    _on(caption.click, described, [picture, length, preset], answer, "caption")


def _talking(gr: Any, studio: Studio, length: Any, preset: Any) -> None:
    history, shown = gr.State([]), gr.Chatbot(label="Conversation", height=360)
    picture = gr.Image(type="pil", label="Picture for the next message", height=160, visible="caption" in studio.can)
    said = gr.Textbox(label="Message", elem_id="message")
    with gr.Row():
        send, anew = gr.Button("Send", variant="primary"), gr.Button("Start anew")

    def talked(text: str, image: Any, before: list[Any], tokens: int, speed: str) -> Iterator[tuple[Any, ...]]:
        grown = studio.chat(text, image, before, gen_length=int(tokens), preset=speed)
        for messages in _shown(gr, grown):
            yield messages, [_plain(m) for m in messages], "", None

    inputs, outputs = [said, picture, history, length, preset], [history, shown, said, picture]
    _on(send.click, talked, inputs, outputs, "chat")
    _on(said.submit, talked, inputs, outputs, None)
    anew.click(lambda: ([], [], "", None), None, outputs, api_visibility="private")


def _drawing(gr: Any, studio: Studio) -> None:
    prompt = gr.Textbox(label="Prompt", placeholder="a red apple", elem_id="prompt")
    with gr.Row():
        steps = gr.Slider(1, 64, value=_default(studio, "image", "num_inference_steps", 16), step=1, label="passes")
        guidance = gr.Slider(1, 10, value=_default(studio, "image", "guidance", 1.0), label="guidance")
        seed = gr.Number(0, label="seed", precision=0)
    draw, picture = gr.Button("Draw", variant="primary"), gr.Image(label="Picture", elem_id="drawing", format="png")

    def drawn(text: str, passes: int, weight: float, number: int) -> Iterator[Any]:
        words = {"num_inference_steps": int(passes), "guidance": float(weight)}
        yield from _shown(gr, studio.draw(text, number, **words))

    _on(draw.click, drawn, [prompt, steps, guidance, seed], picture, "draw")
    _on(prompt.submit, drawn, [prompt, steps, guidance, seed], picture, None)


def _on(event: Any, function: Any, inputs: Any, outputs: Any, name: str | None) -> None:
    """One thing at a time: the model is one."""
    visible = {"api_name": name} if name else {"api_visibility": "private"}
    event(function, inputs, outputs, concurrency_limit=1, concurrency_id="model", **visible)


def _shown(gr: Any, results: Iterator[Any]) -> Iterator[Any]:
    """The results; an expected error becomes a message on the page."""
    try:
        yield from results
    except MmdiffError as error:
        raise gr.Error(str(error), print_exception=False) from error


def _growing(work: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
    """What ``work`` shows while it runs, and its result; it runs in a thread of its own."""
    seen: queue.Queue[tuple[str, Any]] = queue.Queue()

    def run() -> None:
        try:
            seen.put(("end", work(lambda item: seen.put(("item", item)))))
        except BaseException as error:
            seen.put(("error", error))
            if not isinstance(error, Exception):
                raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while True:
        kind, value = seen.get()
        if kind == "error":
            raise value
        yield value
        if kind == "end":
            thread.join()
            return


def _message(text: str, pictures: Sequence[Any]) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image", "image": p} for p in pictures]
    return {"role": "user", "content": [*content, {"type": "text", "text": text}]}


def _plain(message: dict[str, Any]) -> dict[str, Any]:
    """A message as the chat window shows it."""
    content = message["content"]
    if isinstance(content, str):
        return message
    text = " ".join("[picture]" if part["type"] == "image" else part["text"] for part in content)
    return {"role": message["role"], "content": text}


def _default(studio: Studio, part: str, word: str, otherwise: float) -> float:
    return float(studio.pipeline.checkpoint.defaults.get(part, {}).get(word, otherwise))


def _gradio() -> Any:
    try:
        import gradio
    except ImportError as error:
        raise MissingExtraError("gradio", "ui", "for `mmdiff ui`") from error
    return gradio
