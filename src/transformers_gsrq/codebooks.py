"""`GSRQCodebooks`: the learned tensors, their provenance, and their files."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
from huggingface_hub import CommitInfo
from safetensors import SafetensorError, safe_open

from . import hub
from .card import Rate, model_card
from .config import FORMAT_VERSION, KINDS, GSRQConfig, Kind
from .files import write_tensors
from .hub import CONFIG_NAME, TENSORS_NAME
from .provenance import add_evaluation, add_step, first_stages
from .quantizer import ResidualQuantizer

logger = logging.getLogger(__name__)

STORED_DTYPE = torch.float16


def check_replaceable(folder: Path) -> None:
    """Refuse a folder whose config is not that of codebooks: saving there would make a model unreadable.

    Args:
        folder: There or not.

    Raises:
        FileExistsError: if it is.
    """
    path = folder / CONFIG_NAME
    try:
        ours = not path.exists() or "gsrq" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, OSError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"There is a {CONFIG_NAME} in {folder} that is not of codebooks, but perhaps of a model. "
            "Name a folder that is not there yet."
        )


class GSRQCodebooks:
    """Gains and shapes of every compressed layer, immutable once made.

    A centroid is gain * shape, gain >= 0 and |shape| = 1 (paper, section 3). Tensors are held as they are stored, in
    float16, so that what was calibrated and what is loaded later are the same numbers.

    Args:
        config: The geometry.
        gains: `(layer, kind)` to `[M, R, K]`.
        shapes: `(layer, kind)` to `[M, R, K, S]`.
        provenance: How the codebooks were made: base model, data, seed, versions, measurements. JSON types.

    Raises:
        ValueError: if a tensor is missing, has a wrong shape or dtype, or holds NaN or infinity.
    """

    def __init__(
        self,
        config: GSRQConfig,
        gains: Mapping[tuple[int, Kind], torch.Tensor],
        shapes: Mapping[tuple[int, Kind], torch.Tensor],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self.provenance = dict(provenance or {})
        self._tensors: dict[str, torch.Tensor] = {}
        for layer, kind, part, expected in _expected_tensors(config):
            name = tensor_name(layer, kind, part)
            given = (gains if part == "gains" else shapes).get((layer, kind))
            if given is None:
                raise ValueError(f"{name} is missing: give {part} of every layer in config.layers, keys and values.")
            tensor = given.detach().to("cpu", STORED_DTYPE).contiguous()
            _check_tensor(name, tuple(tensor.shape), tensor.dtype, expected)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} holds NaN or infinity after rounding to float16; calibrate again.")
            self._tensors[name] = tensor
        self._digest: str | None = None
        self._in_use: WeakValueDictionary[tuple[int, Kind, torch.device, torch.dtype], ResidualQuantizer] = (
            WeakValueDictionary()
        )
        self._latest: dict[tuple[int, Kind], ResidualQuantizer] = {}

    def __repr__(self) -> str:
        return (
            f"GSRQCodebooks({self.config.model_type}, {len(self.config.layers)} layers, "
            f"{self.config.bits('key'):g} + {self.config.bits('value'):g} bits, digest {self.digest[:12]})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> GSRQCodebooks:
        # Immutable and large: copies of a cache or of a generation config share it.
        return self

    def gains(self, layer: int, kind: Kind) -> torch.Tensor:
        """Gains `[M, R, K]`, float16."""
        return self._tensors[tensor_name(layer, kind, "gains")]

    def shapes(self, layer: int, kind: Kind) -> torch.Tensor:
        """Unit shapes `[M, R, K, S]`, float16."""
        return self._tensors[tensor_name(layer, kind, "shapes")]

    def quantizer(self, layer: int, kind: Kind, device: torch.device, dtype: torch.dtype) -> ResidualQuantizer:
        """The codebook of a layer and kind as a device computes with it; every cache there shares one.

        The latest of each layer and kind is kept, others live as long as a cache uses them: what a model that moved
        left behind is freed with its caches.
        """
        key = (layer, kind, torch.device(device), dtype)
        found = self._in_use.get(key)
        if found is None:
            # Made under inference_mode they could not be used with gradients later.
            with torch.inference_mode(False), torch.no_grad():
                gains = self.gains(layer, kind).to(device).float()
                centroids = (gains[..., None] * self.shapes(layer, kind).to(device).float()).to(dtype)
            found = ResidualQuantizer(centroids, self.config.num_kv_heads, label=f"layer {layer} {kind}")
            self._in_use[key] = found
        self._latest[layer, kind] = found
        return found

    def centroids(self, layer: int, kind: Kind, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """Centroids gain * shape, `[M, R, K, S]` in `dtype` on `device`: those of `quantizer`."""
        return self.quantizer(layer, kind, device, dtype).centroids

    def with_stages(self, key_stages: int, value_stages: int) -> GSRQCodebooks:
        """Codebooks of a lower rate: the first stages of these.

        Calibration learns stages one after another, so these are the codebooks that calibrating at the lower rate
        gives. `finetune` and `refine` train all stages together: cut after that, they are worse than need be, and a
        warning says so.

        Args:
            key_stages: Stages R of keys in every layer, at most what these have.
            value_stages: Stages R of values in every layer.

        Raises:
            ValueError: if a layer has fewer stages.
        """
        wanted: dict[Kind, int] = {"key": key_stages, "value": value_stages}
        for kind, stages in wanted.items():
            if not 1 <= stages <= min(self.config.stages(kind)):
                raise ValueError(
                    f"{kind}_stages must be 1 to {min(self.config.stages(kind))}, the stages that every layer of "
                    f"these codebooks has, got {stages}."
                )
        joint = self.provenance.get("training", ())
        if joint and (key_stages, value_stages) != (max(self.config.key_stages), max(self.config.value_stages)):
            logger.warning(
                "The stages of these codebooks were trained together (%s), so the first ones alone are worse than "
                "need be. Lower the rate first, with_stages(%d, %d), and train then.",
                ", ".join(step["step"] for step in joint),
                key_stages,
                value_stages,
            )
        num_layers = len(self.config.layers)
        config = dataclasses.replace(
            self.config, key_stages=(key_stages,) * num_layers, value_stages=(value_stages,) * num_layers
        )
        jobs = [(layer, kind) for layer in config.layers for kind in KINDS]
        return GSRQCodebooks(
            config,
            {(layer, kind): self.gains(layer, kind)[:, : wanted[kind]] for layer, kind in jobs},
            {(layer, kind): self.shapes(layer, kind)[:, : wanted[kind]] for layer, kind in jobs},
            first_stages(self.provenance, {kind: wanted[kind] for kind in KINDS}),
        )

    def trained(
        self,
        step: str,
        gains: Mapping[tuple[int, Kind], torch.Tensor],
        shapes: Mapping[tuple[int, Kind], torch.Tensor],
        record: Mapping[str, Any],
        measured: Mapping[str, Any],
        **provenance: Any,
    ) -> GSRQCodebooks:
        """Codebooks that training made of these: the same geometry, and one more step in their provenance.

        Args:
            step: Its name.
            gains: As in the constructor.
            shapes: As in the constructor.
            record: How it was done. JSON types.
            measured: What it measured on the result; not passed on to codebooks made from that.
            **provenance: Entries that are different now.
        """
        history = {**add_step(self.provenance, step, record, measured), **provenance}
        return GSRQCodebooks(self.config, gains, shapes, history)

    @property
    def digest(self) -> str:
        """SHA-256 over the config and every tensor: names exactly these codebooks, in hexadecimal."""
        if self._digest is None:
            digest = hashlib.sha256(json.dumps(self.config.to_dict(), sort_keys=True).encode())
            for name in sorted(self._tensors):
                digest.update(name.encode())
                digest.update(self._tensors[name].numpy().data)
            self._digest = digest.hexdigest()
        return self._digest

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the codebooks to a folder, all files or none.

        Args:
            folder: Created if it is not there; files of older codebooks in it are replaced.

        Raises:
            FileExistsError: if something else than codebooks is in it, such as a model.
            OSError: if it cannot be written, for example because the disk is full.
        """
        folder = Path(folder)
        check_replaceable(folder)
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        # Written first and moved at the end: an interrupted save leaves nothing half-written. Inside of the target,
        # since that may be a link or a mount, and nothing moves from one file system to another.
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            self._write(staging)
            # The config goes last: a folder is complete exactly when it has one that matches the tensors.
            for path in sorted(staging.iterdir(), key=lambda path: path.name == CONFIG_NAME):
                os.replace(path, folder / path.name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()

    def _write(self, folder: Path) -> None:
        write_tensors(folder / TENSORS_NAME, self._tensors)
        document = {
            "library_name": "transformers-gsrq",
            "format_version": FORMAT_VERSION,
            "gsrq": self.config.to_dict(),
            "digest": self.digest,
            "provenance": self.provenance,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> GSRQCodebooks:
        """Load codebooks from a local folder or from the Hub.

        What was downloaded once loads without a connection afterwards.

        Args:
            source: Local folder, or Hub id `owner/name[/subfolder][@revision]`.
            subfolder: Folder of the wanted rate, if not part of `source`.
            revision: Branch, tag or commit, if not part of `source`.
            token: Access token; by default the one of `hf auth login`.
            cache_dir: Where downloads are kept; by default the Hub's usual cache.
            local_files_only: Never connect.

        Raises:
            FileNotFoundError: if there is no such folder, repository or revision, or it holds no codebooks.
            PermissionError: if the Hub refuses the token.
            ConnectionError: if the Hub cannot be reached and nothing was downloaded before.
            ValueError: if the files are damaged, of a newer format, or do not match their config or digest; if the
                subfolder is not inside of `source`.
        """
        folder = hub.fetch(
            source,
            subfolder=subfolder,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
        return cls._load(folder / CONFIG_NAME, folder / TENSORS_NAME)

    @staticmethod
    def available(
        source: str | Path, *, revision: str | None = None, token: str | bool | None = None
    ) -> dict[str, GSRQConfig]:
        """Codebooks in a repository or local folder: their configs by subfolder, "" for the root.

        Args:
            source: Local folder, or Hub id `owner/name[@revision]`.
            revision: Branch, tag or commit, if not part of `source`.
            token: Access token; by default the one of `hf auth login`.

        Raises:
            FileNotFoundError: if there is no such folder, repository or revision.
            PermissionError: if the Hub refuses the token.
            ConnectionError: if the Hub cannot be reached.
            ValueError: if a config is damaged or of a newer format.
        """
        if Path(source).is_dir():
            configs = hub.local_configs(Path(source))
        else:
            configs = hub.hub_configs(hub.HubId.parse(str(source), revision=revision), token=token)
        return {name: _read_rate(path).config for name, path in configs.items()}

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        revision: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        parent_commit: str | None = None,
    ) -> CommitInfo:
        """Push the codebooks and a model card made from their provenance to the Hub, as one commit.

        One repository can hold several rates of a model, each in its own subfolder; the card lists them all. A card
        that somebody wrote or edited by hand is left as it is.

        Args:
            repo_id: `owner/name`, or a name in your own account; created if it is not there.
            subfolder: Where in the repository, for example "1bit"; by default its root.
            revision: Branch; created if it is not there.
            private: Whether a repository that is created is private.
            token: Access token; by default the one of `hf auth login`.
            commit_message: Title of the commit.
            create_pr: Open a pull request instead of pushing to the branch.
            parent_commit: Commit that must still be the newest one, so that nobody's change is lost.

        Returns:
            What the Hub says about the commit: its `oid`, `commit_url` and others.

        Raises:
            PermissionError: if the token may not write there.
            ConnectionError: if the Hub cannot be reached.
            RuntimeError: if somebody else pushed in the meantime.
            ValueError: if the subfolder is not inside of the repository.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder))
            return hub.push(
                Path(folder),
                repo_id,
                lambda full_id, configs: model_card(full_id, {n: _read_rate(path) for n, path in configs.items()}),
                subfolder=subfolder,
                revision=revision,
                private=private,
                token=token,
                commit_message=commit_message or f"Upload KV-cache codebooks, {self.config.bits():g} bits per element",
                create_pr=create_pr,
                parent_commit=parent_commit,
            )

    def with_evaluation(self, record: Mapping[str, Any]) -> GSRQCodebooks:
        """The same codebooks with one more measurement in their provenance, for the model card.

        Args:
            record: JSON types, as `evaluation.records.perplexity_record` makes them. One of the same model, text and
                settings is replaced.

        Raises:
            ValueError: if the perplexity is not a finite number.
        """
        other = copy.copy(self)
        other.provenance = add_evaluation(self.provenance, record)
        return other

    @classmethod
    def _load(cls, config_path: Path, tensors_path: Path) -> GSRQCodebooks:
        document = _read_document(config_path)
        config = GSRQConfig.from_dict(document["gsrq"])
        parts: dict[str, dict[tuple[int, Kind], torch.Tensor]] = {"gains": {}, "shapes": {}}
        try:
            with safe_open(tensors_path, framework="pt") as file:
                expected = {
                    tensor_name(layer, kind, part): (layer, kind, part, shape)
                    for layer, kind, part, shape in _expected_tensors(config)
                }
                present = set(file.keys())
                if present != set(expected):
                    raise ValueError(
                        f"{tensors_path} lacks tensors {sorted(set(expected) - present)[:4]} and has unknown tensors "
                        f"{sorted(present - set(expected))[:4]}; it does not belong to its {CONFIG_NAME}. "
                        "Download or calibrate it again."
                    )
                for name, (layer, kind, part, shape) in expected.items():
                    # Checked on the header, before the bytes are read.
                    header = file.get_slice(name)
                    dtype = torch.float16 if header.get_dtype() == "F16" else header.get_dtype()
                    _check_tensor(name, tuple(header.get_shape()), dtype, shape)
                    parts[part][layer, kind] = file.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(
                f"{tensors_path} is not a complete safetensors file ({error}). Download or calibrate it again."
            ) from error
        codebooks = cls(config, parts["gains"], parts["shapes"], document.get("provenance"))
        if codebooks.digest != document.get("digest"):
            raise ValueError(
                f"The digest of {tensors_path} is {codebooks.digest}, but {CONFIG_NAME} says "
                f"{document.get('digest')}: the tensors or the config were changed. Download or calibrate them again."
            )
        return codebooks


def tensor_name(layer: int, kind: Kind, part: str) -> str:
    """Name of a tensor in the file; `part` is "gains" or "shapes"."""
    return f"layers.{layer}.{kind}.{part}"


def _expected_tensors(config: GSRQConfig) -> list[tuple[int, Kind, str, tuple[int, ...]]]:
    expected: list[tuple[int, Kind, str, tuple[int, ...]]] = []
    for layer in config.layers:
        for kind in KINDS:
            shape = (*config.code_shape(layer, kind), config.num_centroids)
            expected.append((layer, kind, "gains", shape))
            expected.append((layer, kind, "shapes", (*shape, config.subspace_dim(kind))))
    return expected


def _check_tensor(name: str, shape: tuple[int, ...], dtype: object, expected: tuple[int, ...]) -> None:
    if shape != expected or dtype != STORED_DTYPE:
        raise ValueError(
            f"{name} is {dtype} {list(shape)}, but its config asks for {STORED_DTYPE} {list(expected)}. "
            "The file does not belong to this config; download or calibrate the codebooks again."
        )


def _read_rate(path: Path) -> Rate:
    document = _read_document(path)
    return Rate(GSRQConfig.from_dict(document["gsrq"]), document.get("provenance") or {}, document.get("digest", ""))


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}). Download or calibrate the codebooks again.") from error
    if not isinstance(document, dict) or not isinstance(document.get("gsrq"), dict):
        raise ValueError(f'{path} has no "gsrq" section, so it does not describe GSRQ codebooks.')
    version = document.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}; this transformers-gsrq reads version {FORMAT_VERSION}. "
            "Upgrade it with `pip install -U transformers-gsrq`."
        )
    return document
