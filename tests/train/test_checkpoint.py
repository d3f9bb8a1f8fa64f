"""A checkpoint loads in every layout, refuses damage by name, and no failure of a save harms an older one."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from megascale_moe.config import ConfigError
from megascale_moe.train.checkpoint import Checkpoint, Piece, SaveError, latest, save
from megascale_moe.train.checkpoint import files as files_module
from megascale_moe.train.checkpoint.boxes import Box, first_fault, flat_range, intersect

EXPERTS, ROWS, COLUMNS = 8, 6, 5
W13 = "parameters.layers.3.ffn.experts.w13"


def whole(name: str, value: Tensor) -> Piece:
    return Piece(name, tuple(value.shape), (0,) * value.dim(), tuple(value.shape), 0, value.flatten())


def boxed(name: str, value: Tensor, offset: tuple[int, ...], size: tuple[int, ...]) -> Piece:
    box = value[Box(offset, size).slices((0,) * value.dim())]
    return Piece(name, tuple(value.shape), offset, size, 0, box.flatten())


def shares(values: Tensor, ranks: int) -> list[tuple[int, Tensor]]:
    """Unequal flat ranges: what rank r of a sharded optimizer holds of one tensor, maybe nothing."""
    borders = [values.numel() * rank**2 // ranks**2 for rank in range(ranks + 1)]
    return [(begin, values[begin:end]) for begin, end in zip(borders, borders[1:], strict=False)]


def make_state(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator)
    return {
        W13: experts.bfloat16(),
        "exp_avg.layers.3.ffn.experts.w13": experts * 3,
        "parameters.norm.weight": torch.randn(7, generator=generator),
        "parameters.half.weight": torch.randn(3, 4, generator=generator).half(),
        "buffers.tokens": torch.randint(-(2**40), 2**40, (EXPERTS,), generator=generator),
        "buffers.flags": torch.tensor([True, False, True]),
        "buffers.scale": torch.randn((), generator=generator).double(),
        "buffers.empty": torch.zeros(0, 4),
    }


def pieces_of(state: dict[str, Tensor], rank: int, ep: int, dp: int) -> list[Piece]:
    """What a rank of an ep x dp layout saves: its experts' weights, flat ranges of their moments, rank 0 the rest."""
    expert_rank, data_rank = divmod(rank, dp)
    count = EXPERTS // ep
    offset, size = (expert_rank * count, 0, 0), (count, ROWS, COLUMNS)
    weights, moments = state[W13], state["exp_avg.layers.3.ffn.experts.w13"]
    box = moments[offset[0] : offset[0] + count].flatten()
    start, values = shares(box, dp)[data_rank]
    pieces = [Piece("exp_avg.layers.3.ffn.experts.w13", tuple(moments.shape), offset, size, start, values)]
    if data_rank == 0:
        pieces.append(boxed(W13, weights, offset, size))
    if rank == 0:
        pieces += [whole(name, value) for name, value in state.items() if "experts" not in name]
    return pieces


def save_on(world: int, action: Callable[[int, Callable[[], None]], Any]) -> list[Any]:
    """Call `action(rank, barrier)` on as many threads; their results, or the exceptions they ended with."""
    barrier = threading.Barrier(world)
    results: list[Any] = [None] * world

    def run(rank: int) -> None:
        try:
            results[rank] = action(rank, lambda: void(barrier.wait(timeout=10)))
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def void(_: object) -> None:
    """Nothing."""


def save_state(folder: Path, step: int, state: dict[str, Tensor], ep: int = 1, dp: int = 1, keep: int = 0) -> list[Any]:
    def action(rank: int, barrier: Callable[[], None]) -> Path:
        pieces = pieces_of(state, rank, ep, dp)
        return save(folder, step, pieces, {"step": step}, rank=rank, world=ep * dp, barrier=barrier, keep=keep)

    return save_on(ep * dp, action)


def save_alone(folder: Path, step: int, state: dict[str, Tensor], keep: int = 0) -> Path:
    pieces = [whole(name, value) for name, value in state.items()]
    return save(folder, step, pieces, {"step": step}, rank=0, world=1, barrier=lambda: None, keep=keep)


def assert_holds(path: Path, state: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint(path)
    checkpoint.require({name: tuple(value.shape) for name, value in state.items()})
    for name, value in state.items():
        read = checkpoint.read(name, (0,) * value.dim(), tuple(value.shape))
        assert read.dtype == value.dtype
        assert torch.equal(read, value), name
    checkpoint.verify()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files_module, "BLOCK", 64)


# Boxes


def test_flat_range_is_the_elements_in_order() -> None:
    for shape in [(), (5,), (3, 4), (2, 3, 4), (3, 1, 2, 2)]:
        tensor = torch.arange(Box((0,) * len(shape), shape).volume).view(shape)
        box = Box((0,) * len(shape), shape)
        for start in range(box.volume + 1):
            for end in range(start, box.volume + 1):
                boxes = flat_range(box, start, end - start)
                assert len(boxes) <= max(2 * len(shape) - 1, 1)
                parts = [tensor[part.slices(box.offset)].flatten() for part in boxes]
                assert torch.cat([torch.empty(0, dtype=torch.long), *parts]).tolist() == list(range(start, end))


def test_intersection() -> None:
    assert intersect(Box((0, 2), (4, 4)), Box((3, 0), (4, 3))) == Box((3, 2), (1, 1))
    assert intersect(Box((0, 0), (2, 2)), Box((2, 0), (2, 2))) is None
    assert intersect(Box((), ()), Box((), ())) == Box((), ())


def test_first_fault_agrees_with_counting() -> None:
    generator = torch.Generator().manual_seed(1)
    shape = (3, 4, 2)
    faults = 0
    for _ in range(200):
        count = torch.zeros(shape, dtype=torch.long)
        boxes = flat_range(Box((0, 0, 0), shape), 0, 11) + flat_range(Box((0, 0, 0), shape), 11, 13)
        if torch.rand((), generator=generator) < 0.8:
            offset = [int(torch.randint(extent, (), generator=generator)) for extent in shape]
            boxes.append(Box(tuple(offset), tuple(extent - start for extent, start in zip(shape, offset, strict=True))))
        if torch.rand((), generator=generator) < 0.5:
            boxes.pop(int(torch.randint(len(boxes), (), generator=generator)))
        for box in boxes:
            count[box.slices((0, 0, 0))] += 1
        wrong = (count != 1).nonzero().tolist()
        faults += bool(wrong)
        expected = (tuple(wrong[0]), int(count[tuple(wrong[0])])) if wrong else None
        assert first_fault(shape, boxes) == expected
    assert 0 < faults < 200


# Layouts


@pytest.mark.parametrize(("ep", "dp"), [(1, 1), (4, 2), (2, 3), (8, 1)])
def test_whole_tensors_from_any_layout(tmp_path: Path, small_blocks: None, ep: int, dp: int) -> None:
    state = make_state()
    assert save_state(tmp_path, 5, state, ep, dp) == [tmp_path / "step-5"] * (ep * dp)
    assert_holds(tmp_path / "step-5", state)
    checkpoint = Checkpoint(tmp_path / "step-5")
    assert (checkpoint.step, checkpoint.world, checkpoint.extra) == (5, ep * dp, {"step": 5})
    assert latest(tmp_path) == tmp_path / "step-5"
    files = [f"rank-{rank:05d}.safetensors" for rank in range(ep * dp)]
    assert names(tmp_path / "step-5") == ["manifest.json", *files]


def test_any_box_and_any_flat_range(tmp_path: Path, small_blocks: None) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=4, dp=2)
    checkpoint = Checkpoint(tmp_path / "step-1")
    for name in (W13, "exp_avg.layers.3.ffn.experts.w13"):
        value = state[name]
        for offset in product((0, 3, 7), (0, 2), (0, 4)):
            size = (EXPERTS - offset[0], 3, 1)
            expected = value[Box(offset, size).slices((0, 0, 0))]
            assert torch.equal(checkpoint.read(name, offset, size), expected)
            for start, values in shares(expected.flatten(), 3):
                assert torch.equal(checkpoint.read_flat(name, offset, size, start, values.numel()), values)


def test_columns_saved_by_tensor_parallel_ranks(tmp_path: Path) -> None:
    value = torch.randn(6, 8)
    parts = [boxed("w", value, (0, column), (6, 2)) for column in range(0, 8, 2)]
    save(tmp_path, 1, parts, {}, rank=0, world=1, barrier=lambda: None)
    assert_holds(tmp_path / "step-1", {"w": value})
    assert torch.equal(Checkpoint(tmp_path / "step-1").read("w", (2, 3), (3, 4)), value[2:5, 3:7])


def test_reads_in_another_dtype(tmp_path: Path) -> None:
    state = make_state()
    checkpoint = Checkpoint(save_alone(tmp_path, 1, state))
    shape = (EXPERTS, ROWS, COLUMNS)
    assert torch.equal(checkpoint.read(W13, (0, 0, 0), shape, torch.float32), state[W13].float())
    assert checkpoint.read_flat(W13, (0, 0, 0), shape, 3, 9, torch.float64).dtype == torch.float64
    assert checkpoint.dtypes[W13] == torch.bfloat16


def test_what_is_read_does_not_change_the_file(tmp_path: Path) -> None:
    state = make_state()
    checkpoint = Checkpoint(save_alone(tmp_path, 1, state))
    checkpoint.read("parameters.norm.weight", (0,), (7,)).zero_()
    assert_holds(tmp_path / "step-1", state)


def test_the_safetensors_library_reads_the_files(tmp_path: Path) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=2, dp=2)
    with safe_open(tmp_path / "step-1" / "rank-00000.safetensors", "pt") as file:
        assert torch.equal(file.get_tensor(W13), state[W13][:4].flatten())
        assert torch.equal(file.get_tensor("buffers.tokens"), state["buffers.tokens"])


def test_no_pickle_on_the_disk(tmp_path: Path) -> None:
    save_state(tmp_path, 1, make_state(), ep=2)
    assert {path.suffix for path in (tmp_path / "step-1").iterdir()} == {".json", ".safetensors"}
    json.loads((tmp_path / "step-1" / "manifest.json").read_text())
    package = Path(files_module.__file__).parent
    imports = [line for path in package.glob("*.py") for line in path.read_text().splitlines() if "import" in line]
    assert not [line for line in imports if "pickle" in line]


def test_ten_thousand_pieces(tmp_path: Path) -> None:
    """Linear in pieces: this takes a second, where comparing all with all would take minutes."""
    experts = torch.arange(2000 * 2 * 2).view(2000, 2, 2)
    pieces = [boxed("layers.0.ffn.experts.w", experts, (index, 0, 0), (1, 2, 2)) for index in range(2000)]
    flat = torch.arange(4000).view(40, 100)
    pieces += [Piece("flat", (40, 100), (0, 0), (40, 100), start, flat.view(-1)[start : start + 1]) for start in range(4000)]
    tensors = {f"small.{index}": torch.tensor([index]) for index in range(4000)}
    pieces += [whole(name, value) for name, value in tensors.items()]
    path = save(tmp_path, 1, pieces, {}, rank=0, world=1, barrier=lambda: None)
    assert_holds(path, {"layers.0.ffn.experts.w": experts, "flat": flat, **tensors})


# Coverage


def test_missing_expert_is_named(tmp_path: Path) -> None:
    value = torch.randn(EXPERTS, 2, 2)
    pieces = [boxed("layers.0.ffn.experts.w2", value, (index, 0, 0), (1, 2, 2)) for index in range(EXPERTS)]
    del pieces[5]
    with pytest.raises(SaveError, match=r"layers\.0\.ffn\.experts\.w2: expert 5 is missing"):
        save(tmp_path, 1, pieces, {}, rank=0, world=1, barrier=lambda: None)
    assert names(tmp_path) == []


def test_experts_keyed_by_local_index_are_refused_on_all_ranks(tmp_path: Path) -> None:
    """The bug of other libraries: every rank calls its experts 0 to 3, so half of them overwrite the others."""
    local = torch.randn(4, 2, 2)

    def action(rank: int, barrier: Callable[[], None]) -> Path:
        pieces = [Piece("layers.0.ffn.experts.w2", (8, 2, 2), (0, 0, 0), (4, 2, 2), 0, local.flatten())]
        return save(tmp_path, 1, pieces, {}, rank=rank, world=2, barrier=barrier)

    for error in save_on(2, action):
        assert isinstance(error, SaveError)
        assert "layers.0.ffn.experts.w2: expert 0 is there 2 times" in str(error)
    assert names(tmp_path) == []


def test_missing_element_of_a_flat_range_is_named(tmp_path: Path) -> None:
    value = torch.randn(4, 6)
    pieces = [Piece("w", (4, 6), (0, 0), (4, 6), start, value.view(-1)[start:end]) for start, end in [(0, 9), (10, 24)]]
    with pytest.raises(SaveError, match=r"w: element \[1, 3\] of \[4, 6\] is missing"):
        save(tmp_path, 1, pieces, {}, rank=0, world=1, barrier=lambda: None)


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("w", (4,), (2,), (3,), 0, torch.zeros(3)), "no box inside"),
        (Piece("w", (4,), (0, 0), (4, 1), 0, torch.zeros(4)), "no box inside"),
        (Piece("w", (4,), (0,), (4,), 2, torch.zeros(3)), "no elements 2 to 5"),
        (Piece("w", (2, 2), (0, 0), (2, 2), 0, torch.zeros(2, 2)), "must be 1-D"),
        (Piece("w", (4,), (0,), (4,), 0, torch.zeros(8)[::2]), "contiguous"),
        (Piece("w", (4,), (0,), (4,), 0, torch.zeros(4, dtype=torch.complex64)), "complex64 cannot be saved"),
    ],
)
def test_pieces_that_contradict_themselves(tmp_path: Path, piece: Piece, message: str) -> None:
    with pytest.raises(SaveError, match=message):
        save(tmp_path, 1, [piece], {}, rank=0, world=1, barrier=lambda: None)


def test_ranks_that_disagree_about_a_tensor(tmp_path: Path) -> None:
    def action(rank: int, barrier: Callable[[], None]) -> Path:
        value = torch.zeros(2, dtype=(torch.float32, torch.bfloat16)[rank])
        return save(tmp_path, 1, [Piece("w", (4,), (rank * 2,), (2,), 0, value)], {}, rank=rank, world=2, barrier=barrier)

    assert all("w: pieces of two tensors, F32 [4] and BF16 [4]" in str(error) for error in save_on(2, action))


def test_extra_that_json_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(SaveError, match="extra holds a Tensor"):
        save(tmp_path, 1, [], {"state": torch.zeros(1)}, rank=0, world=1, barrier=lambda: None)
    assert names(tmp_path) == []


# Damage


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_flipped_byte_anywhere_in_data_is_refused(tmp_path: Path, small_blocks: None) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=2)
    for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
        path = tmp_path / "step-1" / file
        original = path.read_bytes()
        for at in [*range(0, len(original), 37), len(original) - 1]:
            flip(path, at)
            with pytest.raises(ConfigError, match=f"{file} is damaged"):
                Checkpoint(tmp_path / "step-1").verify()
            path.write_bytes(original)
    assert_holds(tmp_path / "step-1", state)


def test_reading_refuses_damage_without_being_told_to_verify(tmp_path: Path, small_blocks: None) -> None:
    state = make_state()
    save_state(tmp_path, 1, state, ep=2)
    flip(tmp_path / "step-1" / "rank-00001.safetensors", -1)  # the last weight of the last expert
    checkpoint = Checkpoint(tmp_path / "step-1")
    assert torch.equal(checkpoint.read(W13, (0, 0, 0), (4, ROWS, COLUMNS)), state[W13][:4])
    checkpoint.verify(["rank-00000.safetensors"])
    with pytest.raises(ConfigError, match=r"step-1/rank-00001\.safetensors is damaged"):
        checkpoint.read(W13, (7, 0, 0), (1, ROWS, COLUMNS))


def test_flipped_byte_anywhere_in_the_manifest_is_refused(tmp_path: Path) -> None:
    path = save_alone(tmp_path, 1, make_state()) / "manifest.json"
    original = path.read_bytes()
    for at in range(0, len(original), 7):
        flip(path, at)
        if bytes(original[at : at + 1]) != b" " or path.read_bytes()[at : at + 1].strip():
            with pytest.raises(ConfigError, match=r"manifest\.json"):
                Checkpoint(tmp_path / "step-1")
        path.write_bytes(original)


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    save_state(tmp_path, 1, make_state(), ep=2)
    path = tmp_path / "step-1" / "rank-00001.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ConfigError, match=r"rank-00001\.safetensors has [\d,]+ bytes instead of .* incomplete"):
        Checkpoint(tmp_path / "step-1")
    path.unlink()
    with pytest.raises(ConfigError, match=r"rank-00001\.safetensors is missing: the checkpoint is incomplete"):
        Checkpoint(tmp_path / "step-1")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"is not a checkpoint: it has no manifest\.json"):
            Checkpoint(folder)
    for text, message in [
        ("", "not JSON"),
        ("\x80", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "not the manifest"),
        ('{"format": "other"}', "not the manifest"),
        ('{"format": "megascale_moe.checkpoint", "version": 9}', "has format version 9, this program reads version 1"),
        ('{"format": "megascale_moe.checkpoint", "version": 1}', "checksum"),
    ]:
        (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(ConfigError, match=message):
            Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: body["tensors"]["w"]["pieces"].pop(), r"step-1: w: element \[2\] of \[4\] is missing"),
        (lambda body: body["tensors"]["w"]["pieces"][0].update(at=10**6), "lies outside of rank-00000"),
        (lambda body: body["tensors"]["w"].update(dtype="F2"), "unknown dtype F2"),
        (lambda body: body["files"].update({"../../secret": {"size": 1, "blocks": [0]}}), "unexpected file name"),
        (lambda body: body.pop("step"), "damaged: KeyError"),
    ],
)
def test_manifests_of_other_programs(tmp_path: Path, change: Callable[[Any], object], message: str) -> None:
    """The checksum is right, so this was no accident: nothing may be read that was not meant to be."""
    from megascale_moe.train.checkpoint.manifest import _checksum

    value = torch.arange(4.0)
    parts = [Piece("w", (4,), (offset,), (2,), 0, value[offset : offset + 2]) for offset in (0, 2)]
    path = save(tmp_path, 1, parts, {}, rank=0, world=1, barrier=lambda: None) / "manifest.json"
    document = json.loads(path.read_text())
    change(document["body"])
    path.write_text(json.dumps(document | {"crc32": _checksum(document["body"])}))
    with pytest.raises(ConfigError, match=message):
        Checkpoint(tmp_path / "step-1")


def test_checkpoint_of_another_model(tmp_path: Path) -> None:
    checkpoint = Checkpoint(save_alone(tmp_path, 1, {"a": torch.zeros(2), "b": torch.zeros(3, 4)}))
    checkpoint.require({"a": (2,), "b": (3, 4)})
    for expected, message in [
        ({"a": (2,), "b": (3, 4), "c": (1,)}, "another model: it has no c"),
        ({"a": (2,), "b": (4, 3)}, r"another model: b is \[3, 4\] there and \[4, 3\] here"),
        ({"a": (2,)}, "another model: it has b, which is not in this one"),
    ]:
        with pytest.raises(ConfigError, match=message):
            checkpoint.require(expected)  # type: ignore[arg-type]
    for name, offset, size in [("c", (0,), (1,)), ("a", (1,), (2,)), ("a", (-1,), (1,))]:
        with pytest.raises(ConfigError, match=name):
            checkpoint.read(name, offset, size)


# Steps


def test_prune_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 11):
        save_alone(tmp_path, step, {"a": torch.tensor(step)}, keep=2)
    assert names(tmp_path) == ["step-10", "step-11"]
    assert latest(tmp_path) == tmp_path / "step-11"


def test_prune_never_removes_what_was_just_saved(tmp_path: Path) -> None:
    for step in (8, 9):
        save_alone(tmp_path, step, {"a": torch.tensor(step)})
    save_alone(tmp_path, 5, {"a": torch.tensor(5)}, keep=1)  # resumed from an earlier step
    assert names(tmp_path) == ["step-5", "step-8", "step-9"]


def test_overwriting_a_step(tmp_path: Path) -> None:
    save_state(tmp_path, 3, make_state(0), ep=4)
    save_state(tmp_path, 3, make_state(1), ep=2)
    assert_holds(tmp_path / "step-3", make_state(1))
    assert names(tmp_path) == ["step-3"]
    assert len(names(tmp_path / "step-3")) == 3


def test_latest_ignores_what_is_unfinished(tmp_path: Path) -> None:
    assert latest(tmp_path / "nowhere") is None
    assert latest(tmp_path) is None
    save_alone(tmp_path, 2, make_state())
    for name in ("step-10", "step-9.partial", "step-8.removed", "step-7.failed", "step-x", "other"):
        (tmp_path / name).mkdir()
    shutil.copy(tmp_path / "step-2" / "manifest.json", tmp_path / "step-8.removed")
    (tmp_path / "step-11").write_text("a file")
    assert latest(tmp_path) == tmp_path / "step-2"


# Failures


def run_and_kill(action: Callable[[], object], after: int) -> bool:
    """Run it in a child that kills itself at its n-th call that changes the disk; False if there were fewer."""

    def child() -> None:
        calls = 0

        def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **options: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls > after:
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **options)

            return call

        for name in ("mkdir", "rename", "unlink", "rmdir", "fsync"):
            setattr(os, name, deadly(getattr(os, name)))
        files_module.Checksums.add = deadly(files_module.Checksums.add)  # type: ignore[method-assign]
        action()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode in (0, -signal.SIGKILL)
    return process.exitcode != 0


@pytest.mark.parametrize("step", [2, 3], ids=["same step", "next step"])
def test_killed_save_never_harms_the_older_checkpoint(tmp_path: Path, step: int) -> None:
    old, new = {"a": torch.tensor([1, 2]), "b": torch.ones(3)}, {"a": torch.tensor([3, 4]), "b": torch.zeros(3)}
    after = 0
    seen = set()
    while True:
        folder = tmp_path / str(after)
        save_alone(folder, 2, old)
        killed = run_and_kill(lambda folder=folder: save_alone(folder, step, new, keep=1), after)  # type: ignore[misc]
        found = latest(folder)
        assert found is not None
        a = Checkpoint(found).read("a", (0,), (2,))
        assert_holds(found, old if a[0] == 1 else new)
        seen.add(("step-3" in found.name, int(a[0])))
        save_alone(folder, 4, new, keep=1)
        assert names(folder) == ["step-4"]
        assert_holds(folder / "step-4", new)
        if not killed:
            break
        after += 1
    assert after > 10
    assert {value for _, value in seen} == {1, 3}


def test_killed_save_of_several_ranks(tmp_path: Path) -> None:
    save_state(tmp_path, 1, make_state(1), ep=2, dp=2)
    after = 0
    while run_and_kill(lambda: save_state(tmp_path, 2, make_state(2), ep=2, dp=2), after):
        found = latest(tmp_path)
        assert found is not None
        assert_holds(found, make_state(int(found.name[-1])))
        assert_holds(tmp_path / "step-1", make_state(1))
        after += 3
    assert_holds(tmp_path / "step-2", make_state(2))
    assert names(tmp_path) == ["step-1", "step-2"]


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("step", [1, 2], ids=["same step", "next step"])
def test_full_disk_on_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: int, step: int) -> None:
    save_state(tmp_path, 1, make_state(1), ep=2, dp=2)
    write = files_module._write

    def fails_on_one(path: Path, *rest: Any) -> Any:
        result = write(path, *rest)
        return no_space() if f"{bad:05d}" in path.name else result

    with monkeypatch.context() as patch:
        patch.setattr(files_module, "_write", fails_on_one)
        results = save_state(tmp_path, step, make_state(2), ep=2, dp=2)
    for rank, error in enumerate(results):
        assert isinstance(error, SaveError)
        assert ("No space left on device" in str(error)) and ("\n" not in str(error)), rank
    assert names(tmp_path) == ["step-1"]
    assert_holds(tmp_path / "step-1", make_state(1))
    save_state(tmp_path, step, make_state(2), ep=2, dp=2)
    assert_holds(tmp_path / f"step-{step}", make_state(2))


@pytest.mark.parametrize("name", ["rename", "fsync", "mkdir"])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_failing_system_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Whatever fails, all ranks say so or none, and step-1 is the old or the new checkpoint, never a mixture."""
    save_state(tmp_path, 1, make_state(1), ep=2)
    real = getattr(os, name)
    calls = 0

    def fails_once(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return no_space() if calls == call else real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fails_once)
        results = save_state(tmp_path, 1, make_state(2), ep=2)
    if calls < call or (name, call) == ("mkdir", 1):  # of the folder, which is there already
        assert results == [tmp_path / "step-1"] * 2
    else:
        assert [type(result) for result in results] == [SaveError] * 2
    new = Checkpoint(tmp_path / "step-1").read("parameters.norm.weight", (0,), (7,))
    assert_holds(tmp_path / "step-1", make_state(2 if torch.equal(new, make_state(2)["parameters.norm.weight"]) else 1))
    assert names(tmp_path) == ["step-1"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="tmpfs")
def test_disk_that_is_really_full(small_disk: Path) -> None:
    def action(rank: int, barrier: Callable[[], None], step: int, size: int) -> Path:
        value = torch.full((size,), float(step))
        pieces = [Piece("w", (2 * size,), (rank * size,), (size,), 0, value)]
        return save(small_disk, step, pieces, {}, rank=rank, world=2, barrier=barrier)

    save_on(2, lambda rank, barrier: action(rank, barrier, 1, 30_000))
    for step in (1, 2):
        for error in save_on(2, lambda rank, barrier, step=step: action(rank, barrier, step, 60_000)):  # type: ignore[misc]
            assert re.search("not saved: .*No space left on device", str(error))
        assert names(small_disk) == ["step-1"]
        assert_holds(small_disk / "step-1", {"w": torch.full((60_000,), 1.0)})


def test_pieces_that_cannot_be_made(tmp_path: Path) -> None:
    """The iterable of one rank raises (out of memory): the others must not wait for it."""

    def pieces(rank: int) -> Iterator[Piece]:
        yield Piece("w", (2,), (rank,), (1,), 0, torch.zeros(1))
        if rank == 1:
            raise RuntimeError("out of memory")

    def action(rank: int, barrier: Callable[[], None]) -> Path:
        return save(tmp_path, 1, pieces(rank), {}, rank=rank, world=2, barrier=barrier)

    assert all("out of memory" in str(error) for error in save_on(2, action))
    assert names(tmp_path) == []


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    results = save_state(tmp_path / "file", 1, make_state(), ep=2)
    assert [type(result) for result in results] == [SaveError] * 2


def test_ranks_that_see_different_folders(tmp_path: Path) -> None:
    def action(rank: int, barrier: Callable[[], None]) -> Path:
        folder = tmp_path / f"node{rank}"
        (folder / "step-1.partial").mkdir(parents=True, exist_ok=True)
        pieces = [Piece("w", (2,), (rank,), (1,), 0, torch.zeros(1))]
        return save(folder, 1, pieces, {}, rank=rank, world=2, barrier=barrier)

    results = save_on(2, action)
    assert all("do all ranks see the same folder?" in str(error) for error in results)
