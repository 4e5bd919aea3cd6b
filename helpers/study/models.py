"""What is a model folder? Embedded, local or of the hub: safetensors, config and tokenizer.

Only safetensors and GGUF weights are read, never pickles; no code of a model's author is run.
"""

import json
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers.merge import read_folder
from helpers.study import archives
from helpers.study.archives import AssetError
from helpers.study.packed import converted, model_digest, unpacked

DTYPES = ("float32", "bfloat16", "float16")
PICKLES = {".bin", ".pt", ".pth", ".ckpt"}


def model_folder(name: str) -> Path:
    """Folder with the safetensors, config and tokenizer of a model. Raises AssetError.

    `name` is an embedded model (fetched and converted at the first call), a folder with
    safetensors or one GGUF file, a .gguf file, or a hub id "org/name", "org/name@revision", which
    is downloaded.
    """
    embedded = archives.CATALOGUE["models"]
    for short, entry in embedded.items():
        if name in (short, entry["name"]):
            return unpacked(short, entry)
    path = Path(name).expanduser()
    if path.exists():
        return _local(path)
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return _local(_downloaded(name))
    raise AssetError(
        f"there is no model {name!r}: name one of {', '.join(embedded)}, a local folder, or a hub "
        "id (org/name)."
    )


def _downloaded(name: str) -> Path:
    """Folder of a model of the hub, in the hub's own cache."""
    patterns = {
        "allow_patterns": ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
    }
    # second copies of the weights
    patterns |= {"ignore_patterns": ["*/*", "consolidated*"]}
    try:
        repository, _, revision = name.partition("@")
        return Path(
            snapshot_download(repository, revision=revision or None, **patterns)
        )
    except GatedRepoError as error:
        raise AssetError(
            f"{name!r} is gated: accept its terms on its page on the hub, and log in (`hf auth "
            "login`)."
        ) from error
    except OSError as error:
        raise AssetError(
            f"cannot fetch {name!r} from the hub ({type(error).__name__}): connect to the "
            "network, check the name and your access to it, or name a local folder."
        ) from error


def base_info(name: str) -> dict[str, str]:
    """{"name", "digest"} of a base model, as a specialist's base.json records it."""
    folder = model_folder(name)
    # made here; elsewhere base.json may tell of another base
    if (folder / "seals.json").exists():
        return json.loads((folder / "base.json").read_text())
    label = folder.name if Path(name).expanduser().exists() else name
    return {"name": label, "digest": model_digest(folder)}


def load_model(
    name: str,
    dtype: str = "float32",
    device: str = "cpu",
    auto_class: type = AutoModelForCausalLM,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(model in evaluation mode, tokenizer) of an embedded, local or hub model.

    Device "auto" spreads the model over all GPUs (by accelerate). TF32 is switched off; the
    tokenizer pads on the right, with the end token where the model has no pad token of its own.
    Raises AssetError, ValueError.
    """
    if dtype not in DTYPES:
        raise ValueError(
            f"dtype {dtype!r} is unknown: name one of {', '.join(DTYPES)}."
        )
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    folder = model_folder(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (ImportError, OSError, ValueError) as error:
        # of a package that it is said to need
        raise AssetError(
            f"{folder} has no tokenizer that can be read: copy one to it."
        ) from error
    tokenizer.padding_side = "right"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {"use_safetensors": True, "trust_remote_code": False}
    if device == "auto":
        options["device_map"] = device
    model = auto_class.from_pretrained(folder, dtype=dtype, **options)
    model = model if device == "auto" else model.to(device)
    return model.eval(), tokenizer


def _local(path: Path) -> Path:
    """The model folder that a local path means, its weights looked at; raises AssetError."""
    if path.is_dir() and any(path.glob("*.safetensors*")):
        _check_weights(path)
        return path
    if path.suffix == ".safetensors":
        raise AssetError(f"{path} is a file of weights: name its folder.")
    files = [path] if path.is_file() else sorted(path.iterdir())
    ggufs = [file for file in files if file.suffix == ".gguf"]
    if len(ggufs) == 1:
        return converted(ggufs[0])
    if ggufs:
        raise AssetError(f"{path} has {len(ggufs)} GGUF files: name one of them.")
    if {file.suffix for file in files} & PICKLES:
        raise AssetError(
            f"{path} has its weights as pickles only, and unpickling can run any code: save them "
            "as safetensors first."
        )
    inside = sorted({file.parent.name for file in path.glob("*/*.safetensors")})
    hint = f"; its folders {', '.join(inside)} have: name one" if inside else ""
    raise AssetError(
        f"{path} has no weights: neither *.safetensors nor one *.gguf file{hint}."
    )


def _check_weights(folder: Path) -> None:
    """Raise AssetError for weights without a config, and for files that are cut short."""
    configs = [folder / name for name in ("config.json", "adapter_config.json")]
    if not any(config.exists() for config in configs):
        raise AssetError(
            f"{folder} has safetensors but no config.json: name a model's folder."
        )
    try:
        read_folder(folder)  # reads the headers and compares the sizes
    except (ValueError, OSError) as error:
        raise AssetError(f"{error}.") from error
