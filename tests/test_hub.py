"""The Hub without a network: a local folder, and an HTTP layer that keeps what was uploaded and gives it back."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import Tensor, nn

from vsrplug import PluggedModel, Plugin, attach
from vsrplug.backbones import BasicVSR, SPyNet
from vsrplug.hub import HubModel
from vsrplug.lora import LoRA, lora_state
from vsrplug.plugged import fingerprint
from vsrplug.plugins import MemoryBankPlugin

C = 8


class Mine(MemoryBankPlugin):
    """A class that the library does not know."""


def basicvsr() -> BasicVSR:
    torch.manual_seed(5)  # the same weights each time: the backbone that everybody has
    return BasicVSR(C, 1, flow=SPyNet(levels=2, widths=(4, 4)), reconstruction_channels=8).eval()


def tuned(kind: type[Plugin] = MemoryBankPlugin) -> PluggedModel:
    model = attach(basicvsr(), bank=kind(C, sites=("fused", "forward_output"), groups=4, entries=6))
    LoRA(rank=2, alpha=3.0, targets=("fusion", "conv_last")).insert(model.backbone)
    with torch.no_grad():
        for value in (*model.plugins.parameters(), *lora_state(model.backbone).values(), model.backbone.conv_hr.bias):
            value.add_(0.1 * torch.randn_like(value))  # type: ignore[arg-type, operator]
    return model.eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.rand(1, 2, 3, 8, 9, generator=torch.Generator().manual_seed(3)))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_a_folder_and_back(tmp_path: Path) -> None:
    model = tuned()
    HubModel(model).save_pretrained(tmp_path / "it")
    assert sorted(path.name for path in (tmp_path / "it").iterdir()) == [
        "README.md",
        "config.json",
        "plugins.safetensors",
    ]
    again = HubModel.from_pretrained(tmp_path / "it", backbone=basicvsr())
    assert torch.equal(run(again.model.eval()), run(model))
    again.save_pretrained(tmp_path / "again")
    for name in ("README.md", "config.json"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "it" / name).read_text()


def test_the_card_says_what_it_is_and_how_to_use_it(tmp_path: Path) -> None:
    model = tuned()
    HubModel(model).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    header = huggingface_hub.ModelCard(card).data
    assert header.library_name == "vsrplug"
    assert "video-super-resolution" in header.tags
    bank, plain = model.plugins["bank"], basicvsr()
    assert "# MemoryBank and LoRA on BasicVSR\n" in card
    assert f"| `bank` (MemoryBankPlugin) | fused, forward_output | {count(bank):,} |" in card
    low_rank = sum(value.numel() for value in lora_state(model.backbone).values())
    assert f"| LoRA, rank 2, alpha 3 | 2 convolutions of the backbone | {low_rank:,} |" in card
    assert f"| tuned entries of the backbone | 1 of {len(plain.state_dict())} | |" in card
    known = json.dumps(fingerprint(plain), sort_keys=True).encode()
    digest = hashlib.blake2b(known, digest_size=8).hexdigest()
    assert f"Backbone: `BasicVSR`, {count(plain):,} parameters, fingerprint `{digest}`." in card
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["backbone"] == {"class": "BasicVSR", "parameters": count(plain), "fingerprint": digest}
    assert facts["plugins"]["bank"]["sites"] == ["fused", "forward_output"]
    assert (facts["lora"], facts["tuned_entries"]) == ({"rank": 2, "alpha": 3.0, "convolutions": 2}, 1)


def test_the_cards_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = BasicVSR()
    model = attach(network, bank=MemoryBankPlugin(64, sites=("fused",)))
    HubModel(model).save_pretrained(tmp_path / "OWNER" / "NAME")
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "OWNER" / "NAME" / "README.md").read_text(), re.DOTALL)
    assert len(code.splitlines()) == 6
    monkeypatch.chdir(tmp_path)
    frames = torch.rand(1, 1, 3, 8, 8)
    scope: dict[str, Any] = {"frames": frames}
    with torch.no_grad():
        exec(code, scope)
        assert torch.equal(scope["sr"], network.eval()(frames))


def test_what_from_pretrained_refuses(tmp_path: Path) -> None:
    HubModel(tuned(Mine)).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"holds plug-ins, not the network under them: HubModel.from_pretrained\(\.\.\., b"
    ):
        HubModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="there is no plug-in class 'Mine'"):
        HubModel.from_pretrained(tmp_path, backbone=basicvsr())
    other = basicvsr()
    with torch.no_grad():
        other.fusion.weight.mul_(2)
    with pytest.raises(ValueError, match=r"other weights: 1 of \d+ entries differ \(fusion\.weight\)"):
        HubModel.from_pretrained(tmp_path, backbone=other, classes=[Mine])
    assert HubModel.from_pretrained(tmp_path, backbone=other, classes=[Mine], force=True).model.plugins
    with pytest.raises(FileNotFoundError, match=r"there is no plug-in file .*plugins\.safetensors"):
        HubModel.from_pretrained(tmp_path.parent, backbone=basicvsr())


class FakeHub:
    """Answers like the Hub, as far as an upload and a download go; `files` is what a repository has."""

    def __init__(self, http: Any) -> None:
        self.http = http
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def __call__(self, request: Any) -> Any:
        path, body = request.url.path, request.read()
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return self.http.Response(200, json={"url": "https://huggingface.co/me/seem", "name": "me/seem", "id": "1"})
        if path == "/api/validate-yaml":
            return self.http.Response(200, json={"errors": [], "warnings": []})
        if path == "/api/models/me/seem/preupload/main":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            return self.http.Response(200, json={"files": files})
        if path == "/api/models/me/seem/commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            commit = {"commitUrl": "https://huggingface.co/me/seem/commit/abc", "commitOid": "abc", "success": True}
            return self.http.Response(200, json=commit)
        content = self.files.get(path.removeprefix("/me/seem/resolve/main/"))
        if content is None:
            return self.http.Response(404, headers={"X-Error-Code": "EntryNotFound"})
        headers = {"ETag": hashlib.sha1(content).hexdigest(), "X-Repo-Commit": "a" * 40, "Accept-Ranges": "none"}
        if request.method == "HEAD":
            return self.http.Response(200, headers=headers | {"Content-Length": str(len(content))})
        return self.http.Response(200, headers=headers, content=content)


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """In place of HTTP, for everything that huggingface_hub does."""
    from huggingface_hub.utils import _http

    http = import_module(type(huggingface_hub.get_session()).__module__.partition(".")[0])
    hub = FakeHub(http)
    before = _http._GLOBAL_CLIENT_FACTORY
    huggingface_hub.set_client_factory(lambda: http.Client(transport=http.MockTransport(hub)))
    yield hub
    huggingface_hub.set_client_factory(before)


def test_pushed_and_fetched(fake_hub: FakeHub, tmp_path: Path) -> None:
    model = tuned()
    assert HubModel(model).push_to_hub("me/seem", token="hf_none", private=True) == (
        "https://huggingface.co/me/seem/commit/abc"
    )
    (created,) = fake_hub.created
    assert (created["name"], created["organization"]) == ("seem", "me")
    assert "private" in str(created)
    HubModel(model).save_pretrained(tmp_path / "it")
    for name in ("config.json", "README.md"):
        expected = (tmp_path / "it" / name).read_text().replace("OWNER/NAME", "me/seem")
        assert fake_hub.files[name].decode() == expected
    assert 'HubModel.from_pretrained("me/seem", backbone=backbone)' in fake_hub.files["README.md"].decode()
    assert set(fake_hub.files) == {"config.json", "README.md", "plugins.safetensors"}

    fetched = HubModel.from_pretrained("me/seem", backbone=basicvsr(), cache_dir=tmp_path / "cache", token=False)
    assert torch.equal(run(fetched.model.eval()), run(model))
    del fake_hub.files["plugins.safetensors"]
    with pytest.raises(huggingface_hub.errors.EntryNotFoundError, match=r"me/seem/resolve/main/plugins\.safetensors"):
        HubModel.from_pretrained("me/seem", backbone=basicvsr(), cache_dir=tmp_path / "none", token=False)


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vsrplug.hub")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(
        ImportError, match=r"the Hub needs huggingface_hub \(.*\); install it: pip install 'vsrplug\[hub\]'"
    ):
        import_module("vsrplug.hub")
