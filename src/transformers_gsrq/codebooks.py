"""`GSRQCodebooks`: the learned tensors, their provenance, and their files."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
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
from .foreign import printable, shown
from .hub import CONFIG_NAME, TENSORS_NAME
from .provenance import add_evaluation, add_step, check_provenance, first_stages
from .quantizer import ResidualQuantizer

logger = logging.getLogger(__name__)

STORED_DTYPE = torch.float16
# Of the norm of a stored shape from 1. Rounding to float16 makes 0.0005.
NORM_TOLERANCE = 0.01
_AGAIN = "Download or calibrate the codebooks again."


def check_replaceable(folder: Path) -> None:
    """Refuse a folder whose config is not that of codebooks: saving there would make a model unreadable.

    Args:
        folder: There or not.

    Raises:
        FileExistsError: if it is.
    """
    path = folder / CONFIG_NAME
    try:
        ours = not path.exists() or "gsrq" in _read_json(path)
    except (ValueError, OSError):
        ours = False
    if not ours:
        raise FileExistsError(
            f"There is a {CONFIG_NAME} in {folder} that is not of codebooks, but perhaps of a model. "
            "Name a folder that is not there yet."
        )


class GSRQCodebooks:
    """Gains and shapes of every compressed layer, immutable once made.

    A centroid is gain * shape, gain >= 0 and |shape| = 1 (paper, section 3); a gain of 0 needs no direction. Tensors
    are held as they are stored, in float16, so that what was calibrated and what is loaded later are the same numbers.

    Args:
        config: The geometry.
        gains: `(layer, kind)` to `[M, R, K]`.
        shapes: `(layer, kind)` to `[M, R, K, S]`.
        provenance: How the codebooks were made: base model, data, seed, versions, measurements. JSON types.

    Raises:
        TypeError: if an argument is of another type.
        ValueError: if a tensor is missing, has a wrong shape, or holds NaN, infinity, negative gains or shapes that
            are not unit vectors; if sums of centroids could overflow float16; if the provenance is not JSON, or an
            entry that model cards show is of another type.
    """

    def __init__(
        self,
        config: GSRQConfig,
        gains: Mapping[tuple[int, Kind], torch.Tensor],
        shapes: Mapping[tuple[int, Kind], torch.Tensor],
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(config, GSRQConfig):
            raise TypeError(
                f"config must be a GSRQConfig, got {type(config).__name__}. Codebooks in a folder or on the Hub are "
                "loaded with GSRQCodebooks.from_pretrained(...)."
            )
        for name, given in (("gains", gains), ("shapes", shapes), ("provenance", provenance or {})):
            if not isinstance(given, Mapping):
                raise TypeError(f"{name} must be a mapping, got {type(given).__name__}.")
        self.config = config
        self.provenance = dict(provenance or {})
        check_provenance(self.provenance, config.layers)
        self._tensors: dict[str, torch.Tensor] = {}
        for layer, kind, part, expected in _expected_tensors(config):
            name = tensor_name(layer, kind, part)
            tensor = (gains if part == "gains" else shapes).get((layer, kind))
            if tensor is None:
                raise ValueError(f"{name} is missing: give {part} of every layer in config.layers, keys and values.")
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}.")
            _check_tensor(name, tuple(tensor.shape), STORED_DTYPE, expected)
            # A copy: what the caller does with theirs changes nothing here.
            self._tensors[name] = tensor.detach().to("cpu", STORED_DTYPE, copy=True).contiguous()
            if part == "shapes":
                gains_name = tensor_name(layer, kind, "gains")
                _check_values(gains_name, self._tensors[gains_name], name, self._tensors[name])
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
        """Gains `[M, R, K]`, float16; a copy."""
        return self._stored(layer, kind, "gains").clone()

    def shapes(self, layer: int, kind: Kind) -> torch.Tensor:
        """Unit shapes `[M, R, K, S]`, float16; a copy."""
        return self._stored(layer, kind, "shapes").clone()

    def _stored(self, layer: int, kind: Kind, part: str) -> torch.Tensor:
        """A tensor itself, for reading only.

        Raises:
            ValueError: if there is no such layer or kind.
        """
        tensor = self._tensors.get(tensor_name(layer, kind, part))
        if tensor is None:
            raise ValueError(
                f"There are no {part} of layer {shown(layer)}, kind {shown(kind)}. Ask for one of the layers "
                f"{self.config.layers} and one of the kinds {KINDS}."
            )
        return tensor

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
                gains = self._stored(layer, kind, "gains").to(device).float()
                centroids = (gains[..., None] * self._stored(layer, kind, "shapes").to(device).float()).to(dtype)
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
            if not isinstance(stages, int) or not 1 <= stages <= min(self.config.stages(kind)):
                raise ValueError(
                    f"{kind}_stages must be 1 to {min(self.config.stages(kind))}, the stages that every layer of "
                    f"these codebooks has, got {shown(stages)}."
                )
        joint = self.provenance.get("training", ())
        if joint and (key_stages, value_stages) != (max(self.config.key_stages), max(self.config.value_stages)):
            logger.warning(
                "The stages of these codebooks were trained together (%s), so the first ones alone are worse than "
                "need be. Lower the rate first, with_stages(%d, %d), and train then.",
                ", ".join(printable(step["step"]) for step in joint),
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
            {(layer, kind): self._stored(layer, kind, "gains")[:, : wanted[kind]] for layer, kind in jobs},
            {(layer, kind): self._stored(layer, kind, "shapes")[:, : wanted[kind]] for layer, kind in jobs},
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

        At every moment, and after a crash at any, `from_pretrained` finds there whole codebooks: those that were in
        the folder before, or these.

        Args:
            folder: Created if it is not there; files of older codebooks in it are replaced.

        Raises:
            FileExistsError: if something else than codebooks is in it, such as a model.
            OSError: if it cannot be written, for example because the disk is full.
            TypeError: if it is no path.
            ValueError: if it is the empty string.
        """
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder must be a path, got {type(folder).__name__}.")
        if not str(folder):
            raise ValueError("folder is an empty string. Name a folder; '.' is the working directory.")
        folder = Path(folder)
        check_replaceable(folder)
        new = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        # Written first and moved at the end: an interrupted save leaves nothing half-written. Inside of the target,
        # since that may be a link or a mount, and nothing moves from one file system to another.
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
        try:
            self._write(staging)
            self._put(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            if new and not any(folder.iterdir()):
                folder.rmdir()

    def _put(self, staging: Path, folder: Path) -> None:
        """Move both files into place, one after the other; each step leaves a folder that `_load` reads."""
        beside = folder / f"codebooks-{self.digest}.safetensors"
        if not all((folder / name).exists() for name in (CONFIG_NAME, TENSORS_NAME)):
            # A folder without a config holds nothing yet.
            os.replace(staging / TENSORS_NAME, folder / TENSORS_NAME)
            os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)
            return
        old = _digest_in(folder)
        # The config decides: where it names the digest of tensors that lie beside the old ones, those are meant.
        os.replace(staging / TENSORS_NAME, beside)
        try:
            os.replace(staging / CONFIG_NAME, folder / CONFIG_NAME)
        except OSError:
            beside.unlink()
            raise
        os.replace(beside, folder / TENSORS_NAME)
        if old is not None and old != self.digest:
            # What a save of the old ones left that was stopped before the last step.
            _tensor_files(folder, old)[0].unlink(missing_ok=True)

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
        return cls._load(folder)

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
        if hub.is_local(source):
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
    def _load(cls, folder: Path) -> GSRQCodebooks:
        config = folder / CONFIG_NAME
        while True:
            written = _written(config)
            rate = _read_rate(config)
            try:
                return cls._read(folder, rate)
            except (ValueError, OSError):
                # Somebody may have saved others in the meantime, and then perhaps the same ones again.
                if _written(config) == written:
                    raise

    @classmethod
    def _read(cls, folder: Path, rate: Rate) -> GSRQCodebooks:
        beside, usual = _tensor_files(folder, rate.digest)
        try:
            parts = _read_tensors(beside, rate.config)
        except FileNotFoundError:
            parts, beside = _read_tensors(usual, rate.config), usual
        try:
            codebooks = cls(rate.config, parts["gains"], parts["shapes"], rate.provenance)
        except ValueError as error:
            raise ValueError(f"{printable(beside)}: {error} {_AGAIN}") from error
        if codebooks.digest != rate.digest:
            raise ValueError(
                f"The digest of {printable(beside)} is {codebooks.digest}, but {CONFIG_NAME} says {rate.digest}: the "
                "tensors or the config were changed. Download or calibrate them again."
            )
        return codebooks


def tensor_name(layer: int, kind: Kind, part: str) -> str:
    """Name of a tensor in the file; `part` is "gains" or "shapes"."""
    return f"layers.{layer}.{kind}.{part}"


def _expected_tensors(config: GSRQConfig) -> Iterator[tuple[int, Kind, str, tuple[int, ...]]]:
    """Layer, kind, part and shape of each tensor, gains before their shapes."""
    for index, layer in enumerate(config.layers):
        for kind in KINDS:
            shape = (config.num_subspaces(kind), config.stages(kind)[index], config.num_centroids)
            yield layer, kind, "gains", shape
            yield layer, kind, "shapes", (*shape, config.subspace_dim(kind))


def _check_tensor(name: str, shape: tuple[int, ...], dtype: object, expected: tuple[int, ...]) -> None:
    if shape != expected or dtype != STORED_DTYPE:
        raise ValueError(
            f"{name} is {dtype} {list(shape)}, but its config asks for {STORED_DTYPE} {list(expected)}. "
            "They do not belong together."
        )


def _check_values(gains_name: str, gains: torch.Tensor, shapes_name: str, shapes: torch.Tensor) -> None:
    """Check the numbers of one kind of one layer, as they are stored."""
    gains = gains.float()
    # Finite exactly where all channels are, and sooner known.
    norms = torch.linalg.vector_norm(shapes, dim=-1, dtype=torch.float32)
    for name, tensor in ((gains_name, gains), (shapes_name, norms)):
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or infinity after rounding to float16.")
    if gains.min() < 0:
        raise ValueError(f"{gains_name} holds {gains.min():g}; gains are 0 or more.")
    # A centroid at the origin has no direction.
    wrong = ((norms - 1).abs() * (gains > 0)).max().item()
    if wrong > NORM_TOLERANCE:
        raise ValueError(
            f"{shapes_name} holds vectors whose norm is {wrong:.3g} from 1 where the gain is not 0; shapes are unit "
            "vectors."
        )
    largest = torch.finfo(STORED_DTYPE).max
    # No channel of a sum of centroids is larger than the sum of the gains, which is quicker to know.
    if gains.amax(-1).sum(-1).max() > largest:
        sums = (gains[..., None] * shapes.float()).abs().amax(-2).sum(-2)
        if sums.max() > largest:
            raise ValueError(f"{gains_name}: sums of centroids reach {sums.max():.3g}, more than float16 can hold.")


def _written(path: Path) -> tuple[int, int] | None:
    """Which file there is under a name, and since when; None if there is none."""
    try:
        held = path.stat()
    except FileNotFoundError:
        return None
    return held.st_ino, held.st_mtime_ns


def _tensor_files(folder: Path, digest: str) -> tuple[Path, Path]:
    """Where the tensors of a digest may be: beside others, after an interrupted save; or where they belong."""
    return folder / f"codebooks-{digest}.safetensors", folder / TENSORS_NAME


def _read_tensors(path: Path, config: GSRQConfig) -> dict[str, dict[tuple[int, Kind], torch.Tensor]]:
    """Gains and shapes from a file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or does not fit the config.
    """
    parts: dict[str, dict[tuple[int, Kind], torch.Tensor]] = {"gains": {}, "shapes": {}}
    if not path.exists():
        raise FileNotFoundError(f"There is no file {printable(path)}.")
    try:
        with safe_open(path, framework="pt") as file:
            expected = {
                tensor_name(layer, kind, part): (layer, kind, part, shape)
                for layer, kind, part, shape in _expected_tensors(config)
            }
            present = set(file.keys())
            if present != set(expected):
                raise ValueError(
                    f"{printable(path)} lacks tensors {sorted(set(expected) - present)[:4]} and has unknown tensors "
                    f"{shown(sorted(present - set(expected))[:4])}; it does not belong to its {CONFIG_NAME}. {_AGAIN}"
                )
            for name, (layer, kind, part, shape) in expected.items():
                # Checked on the header, before the bytes are read.
                header = file.get_slice(name)
                dtype = torch.float16 if header.get_dtype() == "F16" else header.get_dtype()
                try:
                    _check_tensor(name, tuple(header.get_shape()), dtype, shape)
                except ValueError as error:
                    raise ValueError(f"{printable(path)}: {error} {_AGAIN}") from error
                parts[part][layer, kind] = file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(
            f"{printable(path)} is not a complete safetensors file ({printable(error)}). {_AGAIN}"
        ) from error
    return parts


def _read_rate(path: Path) -> Rate:
    """What a `config.json` says.

    Raises:
        ValueError: naming the file and the field, if it is damaged or of a newer format.
    """
    document = _read_json(path)
    place = printable(path)
    if not isinstance(document.get("gsrq"), dict):
        raise ValueError(f'{place} has no "gsrq" section, so it does not describe GSRQ codebooks.')
    version, digest = document.get("format_version"), document.get("digest")
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(
            f"{place} has format version {shown(version)}; this transformers-gsrq reads version {FORMAT_VERSION}. "
            "Upgrade it with `pip install -U transformers-gsrq`."
        )
    if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
        raise ValueError(f"{place}: digest must be 64 hexadecimal digits, got {shown(digest)}. {_AGAIN}")
    provenance = document.get("provenance")
    try:
        config = GSRQConfig.from_dict(document["gsrq"])
        provenance = {} if provenance is None else provenance
        check_provenance(provenance, config.layers)
    except ValueError as error:
        raise ValueError(f"{place}: {error} {_AGAIN}") from error
    return Rate(config, provenance, digest)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping.

    Raises:
        ValueError: if it does not.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    # Also for numbers of too many digits, and for more levels than Python can read.
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{printable(path)} is not valid JSON ({printable(error)}). {_AGAIN}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{printable(path)} holds {shown(document)}, not the fields of codebooks. {_AGAIN}")
    return document


def _digest_in(folder: Path) -> str | None:
    """The digest that a folder's config names, None if it is damaged."""
    try:
        return _read_rate(folder / CONFIG_NAME).digest
    except ValueError:
        return None
