"""Codebooks over the Hub's protocol, with the real huggingface_hub and a server of our own (tests/hub_server.py)."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hermetic import HUB
from transformers_gsrq import GSRQCodebooks, GSRQConfig
from transformers_gsrq.config import KINDS
from transformers_gsrq.hub import CARD_MARK, HubId

pytestmark = pytest.mark.host
SmolLM2 = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def make_codebooks(seed: int = 0, stages: int = 2, layers: int = 2, subspace_dim: int = 8) -> GSRQCodebooks:
    config = GSRQConfig(
        model_type="llama",
        num_hidden_layers=layers,
        layers=tuple(range(layers)),
        num_kv_heads=2,
        head_dim=subspace_dim,
        key_subspace_dim=subspace_dim,
        value_subspace_dim=subspace_dim,
        key_stages=(stages,) * layers,
        value_stages=(stages,) * layers,
        num_centroids=16,
    )
    random = torch.Generator().manual_seed(seed)
    gains, shapes = {}, {}
    for layer in config.layers:
        for kind in KINDS:
            shape = (*config.code_shape(layer, kind), 16)
            drawn = torch.randn(*shape, subspace_dim, generator=random)
            gains[layer, kind], shapes[layer, kind] = drawn.norm(dim=-1), drawn / drawn.norm(dim=-1, keepdim=True)
    provenance = {"base_model": "someone/llama", "versions": {"torch": "2.13"}, "data": {"name": "some prose"}}
    return GSRQCodebooks(config, gains, shapes, provenance)


@pytest.fixture
def repo_id(request: pytest.FixtureRequest) -> str:
    """A repository of this test's own; not created yet."""
    return "tester/" + "".join(c if c.isalnum() else "-" for c in request.node.name).strip("-")


@pytest.fixture
def lfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files through Git LFS instead of Xet."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)


def paths_since(start: int) -> list[str]:
    return [row["path"] for row in HUB.requests[start:]]


@pytest.mark.parametrize("transport", ["xet", "lfs"])
def test_what_is_pushed_is_what_is_pulled(
    transport: str, repo_id: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if transport == "lfs":
        request.getfixturevalue("lfs")
    start, codebooks = len(HUB.requests), make_codebooks()
    info = codebooks.push_to_hub(repo_id)
    pulled = GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path)
    assert pulled.digest == codebooks.digest
    assert pulled.config == codebooks.config
    assert pulled.provenance == codebooks.provenance
    for layer, kind in ((0, "key"), (1, "value")):
        assert torch.equal(pulled.gains(layer, kind), codebooks.gains(layer, kind))
        assert torch.equal(pulled.shapes(layer, kind), codebooks.shapes(layer, kind))
    seen = paths_since(start)
    # The route was taken, not only the result right; and the second file came from the commit of the first.
    assert any("xet-write-token" in path for path in seen) == (transport == "xet")
    assert any("info/lfs/objects/batch" in path for path in seen) == (transport == "lfs")
    assert f"/{repo_id}/resolve/{info.oid}/codebooks.safetensors" in seen


def test_what_was_loaded_once_loads_offline(repo_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    codebooks = make_codebooks()
    codebooks.push_to_hub(repo_id)
    GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path)
    start = len(HUB.requests)
    assert GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path, local_files_only=True).digest == codebooks.digest
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path).digest == codebooks.digest
    assert paths_since(start) == []
    with pytest.raises(ConnectionError, match="was not downloaded before"):
        GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path / "empty")


def test_a_cache_may_lie_anywhere(repo_id: str, tmp_path: Path) -> None:
    """The client's own folder for commits is called snapshots; others may be too."""
    codebooks = make_codebooks()
    codebooks.push_to_hub(repo_id, subfolder="snapshots/1bit")
    place = f"{repo_id}/snapshots/1bit"
    assert GSRQCodebooks.from_pretrained(place, cache_dir=tmp_path / "snapshots" / "hub").digest == codebooks.digest


def test_no_network(repo_id: str, tmp_path: Path) -> None:
    """A process whose Hub refuses connections still loads what is in its cache, and says why it cannot push."""
    codebooks = make_codebooks()
    codebooks.push_to_hub(repo_id)
    GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path)
    script = (
        "import sys\nfrom transformers_gsrq import GSRQCodebooks\n"
        "codebooks = GSRQCodebooks.from_pretrained(sys.argv[1], cache_dir=sys.argv[2])\nprint(codebooks.digest)\n"
        "try:\n    codebooks.push_to_hub(sys.argv[1])\nexcept ConnectionError as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, repo_id, str(tmp_path)],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"},  # the discard port: nothing listens there
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == codebooks.digest, done.stderr
    assert lines[1].startswith("The Hub cannot be reached")


def test_revisions(repo_id: str, tmp_path: Path) -> None:
    old, new = make_codebooks(1), make_codebooks(2)
    first = old.push_to_hub(repo_id)
    HfApi().create_tag(repo_id, tag="v1")
    new.push_to_hub(repo_id)
    make_codebooks(3).push_to_hub(repo_id, revision="trial")

    def digest(source: str, **options: str) -> str:
        return GSRQCodebooks.from_pretrained(source, cache_dir=tmp_path, **options).digest

    assert digest(f"{repo_id}@v1") == digest(repo_id, revision=first.oid) == old.digest
    assert digest(repo_id) == digest(f"{repo_id}@main") == new.digest
    assert digest(f"{repo_id}@trial") == make_codebooks(3).digest
    with pytest.raises(ValueError, match="Say it once"):
        digest(f"{repo_id}@v1", revision="main")
    with pytest.raises(FileNotFoundError, match="no branch, tag or commit 'v2'"):
        digest(f"{repo_id}@v2")


def test_several_rates_in_one_repository(repo_id: str, tmp_path: Path) -> None:
    whole = make_codebooks(stages=4)
    rates = {"4bit": whole, "2bit": whole.with_stages(2, 2)}
    for name, codebooks in rates.items():
        codebooks.push_to_hub(repo_id, subfolder=name)
    assert {name: config.bits() for name, config in GSRQCodebooks.available(repo_id).items()} == {"2bit": 2, "4bit": 4}
    for name, codebooks in rates.items():
        assert GSRQCodebooks.from_pretrained(f"{repo_id}/{name}", cache_dir=tmp_path).digest == codebooks.digest
        assert GSRQCodebooks.from_pretrained(repo_id, subfolder=name, cache_dir=tmp_path).digest == codebooks.digest
        codebooks.save_pretrained(tmp_path / "local" / name)
    assert GSRQCodebooks.available(tmp_path / "local") == GSRQCodebooks.available(repo_id)
    for place in (repo_id, f"{repo_id}/1bit", tmp_path / "local"):
        with pytest.raises(FileNotFoundError, match="There are some in: 2bit, 4bit"):
            GSRQCodebooks.from_pretrained(place)
    card = Path(HfApi().hf_hub_download(repo_id, "README.md")).read_text()
    assert "| 2bit | 2 (2, 2) | 16 |" in card
    assert "| 4bit | 4 (4, 4) | 32 |" in card


@pytest.mark.parametrize("spelling", ["rates/1bit/", "/rates/1bit", "./rates//1bit"], ids=["end", "start", "dots"])
def test_a_subfolder_has_one_name(spelling: str, repo_id: str, tmp_path: Path) -> None:
    codebooks = make_codebooks()
    codebooks.push_to_hub(repo_id, subfolder=spelling)
    codebooks.save_pretrained(tmp_path / "local" / "rates" / "1bit")
    for place in (repo_id, tmp_path / "local"):
        assert list(GSRQCodebooks.available(place)) == ["rates/1bit"]
        assert GSRQCodebooks.from_pretrained(place, subfolder=spelling).digest == codebooks.digest
    assert GSRQCodebooks.from_pretrained(f"{repo_id}/rates/1bit", subfolder=spelling).digest == codebooks.digest


def test_a_subfolder_lies_inside(repo_id: str, tmp_path: Path) -> None:
    codebooks = make_codebooks()
    codebooks.save_pretrained(tmp_path)
    message = r"must lie inside of the repository, got '\.\./1bit'"
    with pytest.raises(ValueError, match=message):
        codebooks.push_to_hub(repo_id, subfolder="../1bit")
    for place in (repo_id, tmp_path):
        with pytest.raises(ValueError, match=message):
            GSRQCodebooks.from_pretrained(place, subfolder="../1bit")
    assert ("models", repo_id) not in HUB.repos


def test_card(repo_id: str) -> None:
    def card() -> str:
        return Path(HfApi().hf_hub_download(repo_id, "README.md")).read_text()

    codebooks = make_codebooks()
    codebooks.push_to_hub(repo_id)
    front = huggingface_hub.ModelCard(card()).data
    assert (front.library_name, front.base_model) == ("transformers-gsrq", "someone/llama")
    assert "kv-cache" in front.tags
    assert f'"codebooks": "{repo_id}"' in card()
    assert "Nothing has been measured" in card()
    record = {
        "data": "held-out prose", "perplexity": 12.5, "standard_error": 0.25, "plain_perplexity": 10.0,
        "increase": 0.25, "increase_error": 0.01, "windows": 4, "window_length": 512, "data_digest": "ab" * 32,
        "residual_length": 0, "sink_length": 0, "beam_width": 1, "model": "someone/llama", "dtype": "float32",
        "device": "cpu", "versions": {"torch": "2.13"},
    }  # fmt: skip
    measured = codebooks.with_evaluation(record)
    assert "evaluations" not in measured.with_stages(1, 1).provenance  # it was measured with all stages
    measured.push_to_hub(repo_id)
    assert "| held-out prose | 12.50 ± 0.25 | 10.00 | +25.0% ± 1.0% |" in card()
    # Another text of the same name, another beam and another model are other measurements; the same again is not.
    others = [{"data_digest": "cd" * 32, "standard_error": math.nan}, {"beam_width": 4}, {"model": "someone/sibling"}]
    for other in (*others, {"perplexity": 12.6}):
        measured = measured.with_evaluation({**record, **other})
    measured.push_to_hub(repo_id)
    rows = [line for line in card().splitlines() if line.startswith("| (root) | held-out prose")]
    assert len(rows) == 4 and "| 12.60 ± 0.25 |" in rows[3] and "| 12.50 | 10.00 |" in rows[0]
    assert "someone/sibling, 4 windows" in card() and "beam 4" in card()
    with pytest.raises(ValueError, match="perplexity is nan, so it is not kept"):
        measured.with_evaluation({**record, "perplexity": math.nan})
    # A person took the card over: it stays.
    mine = card().replace(CARD_MARK, "My own words.")
    HfApi().upload_file(path_or_fileobj=mine.encode(), path_in_repo="README.md", repo_id=repo_id)
    make_codebooks(5).push_to_hub(repo_id)
    assert card() == mine


def test_a_local_base_model_is_not_named_as_a_hub_model(repo_id: str, tmp_path: Path) -> None:
    codebooks = make_codebooks()
    codebooks.provenance["base_model"] = str(tmp_path)
    codebooks.push_to_hub(repo_id)
    text = Path(HfApi().hf_hub_download(repo_id, "README.md")).read_text()
    assert huggingface_hub.ModelCard(text).data.base_model is None


@pytest.mark.usefixtures("lfs")
def test_a_cut_download_goes_on_where_it_stopped(repo_id: str, tmp_path: Path) -> None:
    # The client writes what it reads in blocks of 10 MiB; what it has written it does not ask for again.
    codebooks = make_codebooks(stages=16, layers=64, subspace_dim=128)
    codebooks.push_to_hub(repo_id)
    start = len(HUB.requests)
    HUB.cut_after("codebooks.safetensors", 11 * 2**20)
    assert GSRQCodebooks.from_pretrained(repo_id, cache_dir=tmp_path).digest == codebooks.digest
    assert [row["range"] for row in HUB.requests[start:] if row["range"]] == [f"bytes={10 * 2**20}-"]


def test_a_push_on_top_of_somebody_elses_is_refused(repo_id: str) -> None:
    first = make_codebooks(1).push_to_hub(repo_id)
    second = make_codebooks(2).push_to_hub(repo_id)
    with pytest.raises(RuntimeError, match="Somebody pushed to"):
        make_codebooks(3).push_to_hub(repo_id, parent_commit=first.oid)
    assert HfApi().model_info(repo_id).sha == second.oid


def test_tokens(repo_id: str) -> None:
    codebooks = make_codebooks()
    codebooks.push_to_hub(repo_id)
    with pytest.raises(PermissionError, match="refuses your token"):
        codebooks.push_to_hub(repo_id, token="stolen")
    with pytest.raises(PermissionError, match=r"You may not write .* write permission"):
        codebooks.push_to_hub(repo_id, token="reader")
    with pytest.raises(PermissionError, match="You may not write to somebody-else/codebooks"):
        codebooks.push_to_hub("somebody-else/codebooks")
    assert GSRQCodebooks.from_pretrained(repo_id, token="reader").digest == codebooks.digest
    with pytest.raises((PermissionError, FileNotFoundError), match="token"):
        GSRQCodebooks.from_pretrained("tester/nothing-here", token="stolen")


@pytest.mark.parametrize("token", [None, False, True])
def test_without_a_token(token: bool | None, repo_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nonexistent")
    with pytest.raises(PermissionError, match="You are not logged in to the Hub. Log in with `hf auth login`"):
        make_codebooks().push_to_hub(repo_id, token=token)


def test_names_in_a_repository_do_not_command_the_terminal(repo_id: str, tmp_path: Path) -> None:
    make_codebooks().save_pretrained(tmp_path)
    HfApi().create_repo(repo_id)
    name = "1bit\x1b[2J"
    for file in ("config.json", "codebooks.safetensors"):
        HfApi().upload_file(path_or_fileobj=tmp_path / file, path_in_repo=f"{name}/{file}", repo_id=repo_id)
    with pytest.raises(FileNotFoundError, match="There are some in") as refused:
        GSRQCodebooks.from_pretrained(repo_id)
    assert str(refused.value).isprintable()


def damage(change: Callable[[dict], None]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return apply


def swap_tensors(folder: Path) -> None:
    make_codebooks(9).save_pretrained(folder / "other")
    (folder / "other" / "codebooks.safetensors").replace(folder / "codebooks.safetensors")


BAD_FILES = {
    "newer format": (damage(lambda document: document.update(format_version=99)), "Upgrade it with"),
    "not codebooks": (damage(lambda document: document.pop("gsrq")), "does not describe GSRQ codebooks"),
    "tampered tensors": (swap_tensors, "digest .* were changed"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files_on_the_hub_are_refused(case: str, repo_id: str, tmp_path: Path) -> None:
    spoil, message = BAD_FILES[case]
    make_codebooks().save_pretrained(tmp_path / "good")
    spoil(tmp_path / "good")
    HfApi().create_repo(repo_id)
    HfApi().upload_folder(
        repo_id=repo_id, folder_path=tmp_path / "good", allow_patterns=["config.json", "*.safetensors"]
    )
    with pytest.raises(ValueError, match=message):
        GSRQCodebooks.from_pretrained(repo_id)


def test_a_repository_without_codebooks(repo_id: str) -> None:
    HfApi().create_repo(repo_id)
    with pytest.raises(FileNotFoundError, match="holds no codebooks"):
        GSRQCodebooks.from_pretrained(repo_id)
    assert GSRQCodebooks.available(repo_id) == {}
    with pytest.raises(FileNotFoundError, match="neither a local folder nor a Hub repository"):
        GSRQCodebooks.from_pretrained("tester/nothing-here")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a/b", HubId("a/b")),
        ("a/b@v1", HubId("a/b", "", "v1")),
        ("a/b-1.5/1bit", HubId("a/b-1.5", "1bit")),
        ("a/b/rates/1bit@refs/pr/1", HubId("a/b", "rates/1bit", "refs/pr/1")),
    ],
)
def test_hub_ids(text: str, expected: HubId) -> None:
    assert HubId.parse(text) == expected
    assert str(expected) == text


@pytest.mark.parametrize("text", ["codebooks", "./a/b", "/a/b", "../b", "a//b", "a/b@", "~/b", "a/b/../c"])
def test_what_cannot_be_a_hub_id_is_a_missing_folder(text: str) -> None:
    with pytest.raises(FileNotFoundError, match="is not a local folder, nor a Hub id"):
        GSRQCodebooks.from_pretrained(text)


def test_generation_from_the_hub_equals_generation_from_memory(
    smollm2: SmolLM2, tiny_codebooks: GSRQCodebooks, texts: tuple[list[str], list[str]], repo_id: str
) -> None:
    model, tokenizer = smollm2
    ids = tokenizer(texts[1][0], return_tensors="pt")["input_ids"][:, :120]

    def generate(codebooks: object) -> torch.Tensor:
        """Scores of all words at each step: they tell caches apart that happen to choose the same words."""
        config = {"codebooks": codebooks, "residual_length": 16}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, cache_implementation="gsrq",
            cache_config=config, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        assert config == {"codebooks": codebooks, "residual_length": 16}
        return torch.stack(out.scores)

    tiny_codebooks.push_to_hub(repo_id, subfolder="1bit")
    HfApi().create_tag(repo_id, tag="v1")
    local = generate(tiny_codebooks)
    assert torch.equal(generate(f"{repo_id}/1bit@v1"), local)
    # Other codebooks do give other scores, so the equality above says something.
    assert not torch.allclose(generate(tiny_codebooks.with_stages(1, 1)), local, atol=0.1)
