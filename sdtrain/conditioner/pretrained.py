"""Text encoders as transformers saves them: found in a local folder or in the Hugging Face cache, loaded strictly."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging

from sdtrain.errors import ConfigError

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "spiece.model")


def find_folder(pretrained: str, kind: str) -> Path:
    """A folder by its path, or by its name in the cache: OWNER/NAME, OWNER/NAME/text_encoder. Nothing is downloaded.

    Raises:
        ConfigError: where there is none.
    """
    place = Path(pretrained).expanduser()
    words = pretrained.split("/")
    if not place.is_dir() and len(words) >= 2 and all(words):
        with suppress(OSError, ValueError):  # said below
            place = Path(snapshot_download("/".join(words[:2]), local_files_only=True), *words[2:])
    if not (place / "config.json").is_file():
        inside = sorted(path.parent.name for path in place.glob("text_encoder*/config.json"))
        raise ConfigError(
            f"pretrained={pretrained}: "
            + (f"give one of its folders: {', '.join(inside)}" if inside else "no such folder with a config.json")
            + f"; it wants a {kind} and its tokenizer in a local folder, or OWNER/NAME[/FOLDER] out of the Hugging Face"
            " cache, such as SD_FOLDER/text_encoder of any Stable Diffusion in diffusers' layout"
        )
    return place


def architectures(folder: Path) -> list[str]:
    """The classes that config.json says the weights are of."""
    return json.loads((folder / "config.json").read_text()).get("architectures") or []


def load(kind: type[PreTrainedModel], folder: Path, trained: bool) -> PreTrainedModel:
    """The model, with all of its weights. One that trains is in float32; a frozen one as it was saved.

    Raises:
        ConfigError: where it cannot be read, or weights are missing, which transformers would draw at random.
    """
    dtype = torch.float32 if trained else "auto"
    try:
        with _quiet():
            model, found = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(f"pretrained={folder} cannot be read: {str(error).splitlines()[0]}") from error
    wrong = sorted(found["missing_keys"]) or sorted(str(key) for key in found["mismatched_keys"])
    if wrong:
        raise ConfigError(f"pretrained={folder} is no whole {kind.__name__}: it lacks or misfits {wrong[0]}")
    return model


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in the model's folder, or in the folder beside it: text_encoder_2 has tokenizer_2.

    Raises:
        ConfigError: where there is none.
    """
    beside = folder.with_name(folder.name.replace("text_encoder", "tokenizer"))
    for place in (folder, beside):
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            try:
                with _quiet():
                    return AutoTokenizer.from_pretrained(place, local_files_only=True)
            except (OSError, ValueError, ImportError) as error:
                raise ConfigError(f"the tokenizer {place} cannot be read: {str(error).splitlines()[0]}") from error
    raise ConfigError(f"pretrained={folder}: there is no tokenizer, neither there nor in {beside}")


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no report of the vision half's weights: what is missing is checked above."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
