"""Answer a prompt with onnxruntime-genai, which it needs, and the files beside it.

python generate.py --prompt 'What is the capital of France?'
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from graphopt.support.plain import plain_text


def with_pictures(model: Any, tokenizer: Any, folder: Path, prompt: str, files: list[str]) -> Any:
    """Return the inputs of a prompt about pictures, in the model's chat template if it has one.

    Without a template the prompt has to hold what stands for a picture.
    """
    import onnxruntime_genai as og

    if (folder / "chat_template.jinja").is_file():
        content = [{"type": "image"}] * len(files) + [{"type": "text", "text": prompt}]
        messages = json.dumps([{"role": "user", "content": content}])
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return model.create_multimodal_processor()(prompt, images=og.Images.open(*files))


def encode(tokenizer: Any, folder: Path, prompt: str, raw: bool) -> list[int]:
    """Return the token ids of a prompt, in the model's chat template if it has one."""
    if raw or not (folder / "chat_template.jinja").is_file():
        # By itself onnxruntime-genai leaves out what the tokenizer puts before a text.
        tokenizer.update_options(add_special_tokens="true")
        text = prompt
    else:
        # A template writes the special tokens itself.
        messages = json.dumps([{"role": "user", "content": prompt}])
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return [int(token) for token in tokenizer.encode(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Answer a prompt with onnxruntime-genai.")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", action="append", help="a picture; may be given several times")
    parser.add_argument("--new", type=int, default=256, help="tokens at most")
    parser.add_argument("--greedy", action="store_true", help="take the likeliest token each time")
    parser.add_argument("--raw", action="store_true", help="without the chat template")
    options = parser.parse_args()
    import onnxruntime_genai as og

    folder = Path(__file__).parent
    model = og.Model(str(folder))
    tokenizer = og.Tokenizer(model)
    settings = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    if options.image and "vision" not in settings["model"]:
        parser.error("onnxruntime-genai reads text alone of this model")
    ids, seen = [], None
    if options.image:
        seen = with_pictures(model, tokenizer, folder, options.prompt, options.image)
        count = seen["input_ids"].shape()[-1]
    else:
        ids = encode(tokenizer, folder, options.prompt, options.raw)
        count = len(ids)
    room = settings["model"]["context_length"]
    if count >= room:
        parser.error(f"the prompt has {count} tokens, and the model was made for {room}")
    search = {"do_sample": False} if options.greedy else {}
    params = og.GeneratorParams(model)
    # The cache is made for as many tokens at once.
    params.set_search_options(max_length=min(count + options.new, room), **search)
    generator = og.Generator(model, params)
    if seen is not None:
        generator.set_inputs(seen)
    else:
        generator.append_tokens(ids)
    pieces = tokenizer.create_stream()
    while not generator.is_done():
        generator.generate_next_token()
        piece = pieces.decode(generator.get_next_tokens()[0])
        print(plain_text(piece), end="", flush=True)
    print()


if __name__ == "__main__":
    main()
