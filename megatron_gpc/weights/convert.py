"""Hugging Face folder <-> megatron-core's distributed checkpoint, a tensor at a time.

A converted checkpoint is a distributed checkpoint with one folder more: `hf/`, which holds the
configuration, tokenizer, generation configuration and chat template that came with the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_gpc.config import file as config_file
from megatron_gpc.errors import UserError
from megatron_gpc.run.files import SUMS, problems_of_all
from megatron_gpc.weights.families import family_of
from megatron_gpc.weights.folders import carry_over, hf_folder, new_folder, read_hf_config
from megatron_gpc.weights.hf_files import HFReader
from megatron_gpc.weights.hf_writer import cast, write_hf
from megatron_gpc.weights.megatron_files import MegatronReader, write_megatron
from megatron_gpc.weights.places import Place, places_of
from megatron_gpc.weights.table import Param, to_hf, to_megatron

Track = Callable[[Sequence[Place]], Iterable[Place]]
"""Gives the same places back, one by one, and shows how far it is."""


def hf_to_megatron(
    hf: Path, out: Path, dtype: torch.dtype | None = None, track: Track = iter
) -> tuple[str, ...]:
    """Write a Hugging Face checkpoint as a distributed one, which loads at any layout.

    Args:
        out: absent or empty; it appears whole or not at all.
        dtype: of the weights; None: as they are.

    Returns:
        What of config.json is deliberately not followed; a sentence each.

    Raises:
        UserError: unsupported or damaged input (reads headers first, so most of it is found before
            anything is written), or an output that cannot be written.
    """
    hf_config = read_hf_config(hf)
    family = family_of(hf_config)
    params, fields = family.params(hf_config), family.model_fields(hf_config)
    reader = HFReader(hf)
    reader.check(params, family.copies(hf_config))

    def whole(param: Param) -> Tensor:  # a function, so that its parts are gone when it returns
        return to_megatron(param, [cast(name, reader.get(name), dtype) for name in param.hf])

    with new_folder(out) as partial:
        (partial / "hf").mkdir()
        carry_over(hf_folder(hf), partial / "hf", dtype)
        found = track(places_of(params, fields))
        write_megatron(partial, ((place, whole(place.param)) for place in found))
    return fields.notes


def megatron_to_hf(
    checkpoint: Path,
    out: Path,
    *,
    hf: Path | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    track: Track = iter,
) -> None:
    """Write a distributed checkpoint as a Hugging Face folder that loads as it is.

    Args:
        checkpoint: a converted one, or one that training saved.
        out: absent or empty; it appears whole or not at all.
        hf: folder whose configuration and tokenizer go along; None: as `find_hf` finds it.
        dtype: of the weights; None: as they are.
        max_shard_bytes: a file that would grow larger is followed by another, and an index.

    Raises:
        UserError: as `hf_to_megatron`.
    """
    reader = MegatronReader(checkpoint)
    if (checkpoint / SUMS).exists():  # of a run; converted ones have none
        wrong = problems_of_all(checkpoint)
        if wrong:
            raise UserError(f"{checkpoint} is damaged: {'; '.join(wrong)}; take an older one")
    source = find_hf(checkpoint) if hf is None else hf_folder(hf)
    if dtype is None and len(reader.dtypes()) == 1:  # config.json may say another
        (dtype,) = reader.dtypes()
    write_hf(
        out,
        hf_tensors(reader, source, track),
        source=source,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
    )


def hf_tensors(
    reader: MegatronReader, hf: Path, track: Track = iter
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a distributed checkpoint by their Hugging Face names, one by one.

    The checkpoint is checked when this is called, and read when the result is consumed.

    Args:
        hf: folder with the model's config.json.

    Raises:
        UserError: the checkpoint is damaged, or is not of that model.
    """
    hf_config = read_hf_config(hf)
    family = family_of(hf_config)
    found = places_of(family.params(hf_config), family.model_fields(hf_config))
    reader.check(found)
    return (
        pair
        for place in track(found)
        for pair in zip(place.param.hf, to_hf(place.param, reader.get(place)), strict=True)
    )


def find_hf(checkpoint: Path) -> Path:
    """The folder with configuration and tokenizer that belong to a checkpoint.

    Of a converted checkpoint it is inside; of RUN/checkpoints/step_N, what RUN/config.yaml names as
    model.hf.

    Raises:
        UserError: there is none.
    """
    if (checkpoint / "hf").is_dir():
        return checkpoint / "hf"
    run_config = checkpoint.absolute().parent.parent / "config.yaml"
    if not run_config.is_file():
        raise UserError(
            f"{checkpoint} has no hf folder and does not lie in a run's folder, so nothing says "
            "which model it is; give its Hugging Face folder with --hf"
        )
    hf = hf_folder(config_file.load(run_config).model.hf)
    if not (hf / "config.json").is_file():
        raise UserError(
            f"{run_config} says model.hf: {hf}, which is there no more; give the model's Hugging "
            "Face folder with --hf"
        )
    return hf
