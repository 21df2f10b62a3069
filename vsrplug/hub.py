"""Plug-in files on the Hugging Face Hub: `HubModel(model).push_to_hub("you/name")` and `HubModel.from_pretrained`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

from torch import nn

try:
    from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin, hf_hub_download
except ImportError as error:
    raise ImportError(f"the Hub needs huggingface_hub ({error}); install it: pip install 'vsrplug[hub]'") from error

from vsrplug.lora import LoRA, base_state
from vsrplug.plugged import PluggedModel, fingerprint
from vsrplug.plugin import Plugin
from vsrplug.plugin_files import load_plugins, save_plugins

FILE = "plugins.safetensors"


class HubModel(ModelHubMixin, library_name="vsrplug", tags=["video-super-resolution"]):  # type: ignore[call-arg]
    """A plugged model with the methods of the Hub: `save_pretrained`, `push_to_hub` and `from_pretrained`.

    What goes there is the plug-in file of `save_plugins`, a model card, and `config.json`, which repeats what the card
    says for programs and is not read back. The backbone's own weights stay where they came from, except for entries
    that were tuned.

    Args:
        model: what `attach` or `load_plugins` returned; it is `HubModel.model` then.

    Example:
        >>> HubModel(model).push_to_hub("you/seem-basicvsr")
        >>> model = HubModel.from_pretrained("you/seem-basicvsr", backbone=backbone).model
    """

    def __init__(self, model: PluggedModel) -> None:
        self.model = model

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload, as `huggingface_hub.ModelHubMixin.push_to_hub`, whose options it takes; the card names `repo_id`."""
        card = {"repo_id": repo_id} | (options.pop("model_card_kwargs", None) or {})
        return super().push_to_hub(repo_id, model_card_kwargs=card, **options)

    def generate_model_card(self, *, repo_id: str = "OWNER/NAME") -> ModelCard:
        """What is in the file, on which backbone it belongs, and how to use it."""
        data: ModelCardData = self._hub_mixin_info.model_card_data
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_card(self.model, repo_id)}")

    def _save_pretrained(self, save_directory: Path) -> None:
        save_plugins(self.model, save_directory / FILE)
        (save_directory / "config.json").write_text(json.dumps(_facts(self.model), indent=2) + "\n")

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        backbone: nn.Module | None = None,
        force: bool = False,
        classes: Iterable[type[Plugin]] = (),
    ) -> HubModel:
        """`backbone`, `force` and `classes` are those of `load_plugins`."""
        if backbone is None:
            raise ValueError(
                f"{model_id} holds plug-ins, not the network under them: HubModel.from_pretrained(..., backbone=...) "
                "needs the backbone that its card names"
            )
        path = Path(model_id, FILE)
        if not Path(model_id).is_dir():
            path = Path(
                hf_hub_download(
                    model_id,
                    FILE,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
            )
        return cls(load_plugins(backbone, path, force=force, classes=classes))


def _facts(model: PluggedModel) -> dict[str, Any]:
    """What the file holds, and a digest of the backbone it belongs to."""
    lora, now = LoRA.of(model.backbone), fingerprint(model.backbone)
    known = json.dumps(model.fingerprint, sort_keys=True).encode()
    plugins = cast("dict[str, Plugin]", dict(model.plugins.items()))
    return {
        "library_name": "vsrplug",
        "backbone": {
            "class": type(model.backbone).__name__,
            "parameters": _count(model.backbone, besides="lora_"),
            "fingerprint": hashlib.blake2b(known, digest_size=8).hexdigest(),
        },
        "plugins": {
            name: {"class": type(plugin).__name__, "sites": list(plugin.sites), "parameters": _count(plugin)}
            for name, plugin in plugins.items()
        },
        "lora": lora and {"rank": lora.rank, "alpha": lora.alpha, "convolutions": len(lora.targets)},
        "tuned_entries": sum(now[key] != model.fingerprint.get(key) for key in now),
    }


def _card(model: PluggedModel, repo_id: str) -> str:
    """The text of the card."""
    facts = _facts(model)
    backbone, lora, tuned = facts["backbone"], facts["lora"], facts["tuned_entries"]
    rows = [
        f"| `{name}` ({plugin['class']}) | {', '.join(plugin['sites'])} | {plugin['parameters']:,} |"
        for name, plugin in facts["plugins"].items()
    ]
    if lora:
        added = _count(model.backbone) - backbone["parameters"]
        where = f"{lora['convolutions']} convolutions of the backbone"
        rows.append(f"| LoRA, rank {lora['rank']}, alpha {lora['alpha']:g} | {where} | {added:,} |")
    if tuned:
        rows.append(f"| tuned entries of the backbone | {tuned} of {len(base_state(model.backbone))} | |")
    holds = " and ".join([p["class"].removesuffix("Plugin") for p in facts["plugins"].values()] + ["LoRA"] * bool(lora))
    return "\n".join(
        [
            f"# {holds or 'Tuned entries'} on {backbone['class']}",
            "",
            "For video super-resolution with vsrplug: what was tuned on a backbone. The rest of its weights is not in "
            "this repository.",
            "",
            "| what | where | parameters |",
            "|---|---|---|",
            *rows,
            "",
            f"Backbone: `{backbone['class']}`, {backbone['parameters']:,} parameters, fingerprint "
            f"`{backbone['fingerprint']}`. A backbone with other weights is refused when the file is loaded.",
            "",
            "```python",
            "from vsrplug import load_backbone",
            "from vsrplug.hub import HubModel",
            "",
            f'backbone = load_backbone("{_network(model.backbone)}", "weights.pth")  # those of the fingerprint above',
            f'model = HubModel.from_pretrained("{repo_id}", backbone=backbone).model.eval()',
            "sr = model(frames)  # (b, t, 3, h, w), RGB in [0, 1]",
            "```",
            "",
        ]
    )


def _network(backbone: nn.Module) -> str:
    """What `load_backbone` calls it."""
    from vsrplug.backbones import NETWORKS

    return next((name for name, make in NETWORKS.items() if make is type(backbone)), type(backbone).__name__.lower())


def _count(module: nn.Module, besides: str = "\0") -> int:
    """Parameters, without those with `besides` in their name."""
    return sum(parameter.numel() for name, parameter in module.named_parameters() if besides not in name)
