"""The command line as people and programs meet it: refusals of one line, exit statuses, interrupts, dead ranks."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tokenizers

from megascale_moe import cli
from megascale_moe.checkpoint import writer
from megascale_moe.config import ConfigError
from megascale_moe.train.loop import Loop
from tests.runs import TIMEOUT, Command, Place, ended, make_place, start, wait_until


@pytest.fixture(autouse=True)
def no_process_left() -> Iterator[None]:
    """Whatever a test started ends with it."""
    with ended():
        yield


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """Where a test's runs live."""
    return make_place(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A place with a finished run, for tests that leave it as it is."""
    place = make_place(tmp_path_factory.mktemp("finished"))
    place.train("--train.steps=2")
    return place


def refusal(command: Command) -> str:
    """The line that a command refuses with, after checking that it is all there is."""
    ended = command.wait()
    assert ended.status == 2, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("preparing the corpus")]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("megascale: ")
    return lines[0].removeprefix("megascale: ")


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is wrong in the config or on the command line ------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--train.stepz=3", "key train.stepz is unknown; did you mean 'steps'?"),
        ("--trian.steps=3", "section 'trian' is unknown; did you mean 'train'?"),
        ("--model.preset=mixtral-8x7", "model.preset = 'mixtral-8x7' is unknown; did you mean 'mixtral-8x7b'?"),
        ("--train.steps=many", "train.steps = 'many': must be of type int"),
        ("--train.steps=2.5", "train.steps = 2.5: must be of type int"),
        ("--train.steps=0", "train.steps = 0: must be at least 1"),
        ("--train.learning_rate=nan", "train.learning_rate = nan: must be a finite number"),
        ("--train.max_grad_norm=1", "key train.max_grad_norm is unknown; did you mean 'clip_norm'?"),
        ("--model.layers=1000000000", "model.layers = 1000000000: must be 1 to 10,000"),
        ("--model.expert_groups=0", "model.expert_groups = 0: must be at least 1"),
        ("--run.resume=a\0b", "run.resume = 'a\\x00b': must not contain a NUL character"),
        ("--train.dtype=fp16", "train.dtype = 'fp16': must be one of 'fp32', 'bf16'"),
        ("--steps=3", "argument '--steps=3' is unknown; config keys are overridden as --section.key=value"),
        ("--train.steps", "override '--train.steps': a value is missing; write --train.steps=VALUE"),
        ("--train.steps --json", "override '--train.steps': a value is missing"),
        ("more.toml", "argument 'more.toml' is unknown"),
        ("--resum", "argument '--resum' is unknown"),
        ("--nproc=0", "argument --nproc: '0' is not a number of ranks"),
        ("--nproc=-2", "argument --nproc: '-2' is not a number of ranks"),
        ("--nproc=two", "argument --nproc: 'two' is not a number of ranks"),
        ("--model.heads=3", "model.hidden = 32 is not divisible by model.heads = 3"),
        ("--nproc=3 --model.sequence_length=48", "heads = 4 is not divisible by parallel.node = 3; use one of 1, 2, 4"),
        ("--nproc=3", "model.sequence_length = 32 is not divisible by parallel.node = 3"),
        ("--nproc=4 --model.experts=6", "model.experts = 6 is not divisible by parallel.ep = 4; use one of 1, 2, 3, 6"),
        ("--nproc=2 --parallel.dp=2 --train.global_batch=3", "global_batch = 3 is not divisible by parallel.dp = 2"),
        ("--train.micro_batch=3", "train.micro_batch = 3 does not divide the 4 sequences of each data-parallel rank"),
        ("--nproc=4 --parallel.dp=2 --parallel.node=1", "2 x 1 is not the 4 ranks that were started"),
        ("--nproc=2 --parallel.dp=4", "parallel.dp"),
        ("--nproc=2 --parallel.node=3", "parallel.node = 3 does not divide the 2 ranks; use one of 1, 2"),
        ("--nproc=2 --parallel.ep=3", "parallel.ep = 3 does not divide the 2 ranks; use one of 1, 2"),
        ("--nproc=4 --parallel.ep=-4", "parallel.ep = -4: must not be negative"),
        ("--parallel.pp=2", "model.layers = 1 are fewer than the 2 stages of parallel.pp x parallel.virtual_stages"),
        ("--parallel.pp=2 --model.layers=3 --parallel.stage_layers=[1,1]", "add up to 2, model.layers = 3"),
        ("--parallel.pp=2 --model.layers=4 --parallel.schedule=interleaved --parallel.virtual_stages=2 "
         "--train.global_batch=3", "number of micro-batches = 3"),
        ("--parallel.virtual_stages=2", "with parallel.schedule = '1f1b': use 1, or schedule = 'interleaved'"),
        ("--parallel.schedule=interleaved --parallel.pp=2", "needs parallel.virtual_stages of at least 2"),
        ("--parallel.stage_layers=2", "parallel.stage_layers = 2: must be a list of integers, such as [4, 4, 3]"),
        ("--parallel.node=2 --parallel.ffn=tp --parallel.ep=2", "parallel.ep = 2 with parallel.ffn = 'tp'"),
        ("--overlap.order=magic", "overlap.order = 'magic': must be one of 'serial', 'paper', 'scheduled'"),
        ("--overlap.split=half", "overlap.split = 'half': must be 'none', 'auto' or a number of pieces"),
        ("--overlap.remat=budget", "overlap.activation_bytes = 0 with overlap.remat = 'budget': give the bytes"),
        ("--overlap.activation_bytes=9", "overlap.activation_bytes = 9 with overlap.remat = 'none': use"),
        ("--wire.activations=int8", "wire.activations = 'int8': must be one of 'fp32', 'bf16', 'fp8', 'auto'"),
        ("--train.device=cuda", "train.device = 'cuda': 1 ranks here, 0 GPUs visible"),
        ("--nproc=2 --train.device=cuda", "train.device = 'cuda': 2 ranks here, 0 GPUs visible"),
        ("--model.vocab=100", "model.vocab = 100: too small to train a byte-level tokenizer"),
        ("--model.sequence_length=65536", "training tokens do not fill one row"),
        ("--data.path=missing.txt", "data.path = 'missing.txt': no such file or folder"),
        ("--nproc=2 --data.path=missing.txt", "data.path = 'missing.txt': no such file or folder"),
        ("--run.folder=/proc/run", "run.folder = '/proc/run' cannot be written"),
        ("--data.cache=/proc/cache", "data.cache = '/proc/cache': cannot be written"),
    ],
)
def test_a_wrong_setting_is_refused_in_one_line(finished: Place, tmp_path: Path, options: str, expected: str) -> None:
    command = start(
        "train", str(finished.config), f"--run.folder={tmp_path}", *options.split(),
        environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert expected in refusal(command)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), "the following arguments are required: COMMAND"),
        (("trian",), "invalid choice: 'trian' (choose from 'train'"),
        (("train",), "the following arguments are required: CONFIG.toml"),
        (("train", "missing.toml"), "missing.toml: cannot be read (No such file or directory)"),
        (("doctor", "--train.steps=3"), "argument '--train.steps=3' is unknown"),
        (("config", "--train.steps=3"), "argument '--train.steps=3' is unknown; leave it out"),
        (("config", "train.stepz"), "config key 'train.stepz' is unknown; did you mean 'train.steps'?"),
    ],
)
def test_a_wrong_command_is_refused_in_one_line(arguments: tuple[str, ...], expected: str) -> None:
    assert expected in refusal(start(*arguments))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train\nsteps = 1", "not valid TOML"),
        ("steps = 1", "section [steps] is unknown"),
        ("train = 1", "train must be a section [train]"),
        ("\udcff", "not valid TOML"),
    ],
)
def test_a_broken_config_is_refused_in_one_line(place: Place, text: str, expected: str) -> None:
    place.config.write_bytes(text.encode(errors="surrogateescape"))
    assert expected in refusal(place.start())


@pytest.mark.parametrize("order", [("--train.steps", "2"), ("--train.steps=2",)])
def test_overrides_may_stand_before_the_config(place: Place, order: tuple[str, ...]) -> None:
    command = start("train", *order, str(place.config), "--json")
    assert command.wait().document["step"] == 2


# --- what is wrong with files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("nproc", [1, 2])
def test_an_empty_corpus_is_refused(place: Place, nproc: int) -> None:
    for path in (place.root / "corpus").iterdir():
        path.write_text(" \n")
    assert "no text in it (files: 30, bytes: 60)" in refusal(place.start(f"--nproc={nproc}"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(place: Place) -> None:
    words = {f"word{index}": index for index in range(400)} | {"<|endoftext|>": 400}
    path = place.root / "tokenizer.json"
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0")).save(str(path))
    line = refusal(place.start(f"--data.tokenizer={path}"))
    assert f"data.tokenizer = '{path}': the tokenizer has 401 token ids, the model only 300" in line


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_token_outside_the_vocabulary_is_refused_with_file_and_offset(place: Place, nproc: int) -> None:
    place.train("--train.steps=1", run="other")
    (shard,) = (place.root / "cache").glob("*/tokens-00000.bin")
    with shard.open("r+b") as file:
        file.seek(2 * 77)
        file.write((40_000).to_bytes(2, "little"))
    line = refusal(place.start(f"--nproc={nproc}"))
    assert f"{shard}: token id 40000 at offset 77 (in tokens) is outside the vocabulary of 300" in line


def test_a_run_folder_below_a_file_is_refused(place: Place) -> None:
    (place.root / "file").write_text("kept")
    assert "cannot be written (Not a directory)" in refusal(place.start(run="file/run"))
    assert (place.root / "file").read_text() == "kept"


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_used_run_folder_is_refused_without_resume(finished: Place, nproc: int) -> None:
    before = contents(finished.folder())
    line = refusal(finished.start("--train.steps=4", f"--nproc={nproc}"))
    assert "already holds step-2: continue it with --resume or choose another folder" in line
    assert contents(finished.folder()) == before


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("--model.hidden=64", "is a checkpoint of another model: parameters.embedding.weight is [300, 32] there and"),
        ("--model.layers=2", "is a checkpoint of another model: it has no parameters.layers.1"),
        ("--model.correction_bias=true", "is a checkpoint of another model: it has no buffers.layers.0"),
        ("--train.seed=1", "cannot resume: "),
        ("--data.validation_fraction=0.5", "cannot resume: "),
        ("--run.resume=nowhere", "nowhere is not a checkpoint: it has no manifest.json"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(finished: Place, nproc: int, option: str, expected: str) -> None:
    before = contents(finished.folder())
    assert expected in refusal(finished.start("--resume", "--train.steps=4", f"--nproc={nproc}", option))
    assert contents(finished.folder()) == before


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("name", ["rank-00000.safetensors", "manifest.json"])
def test_a_damaged_checkpoint_is_refused(finished: Place, tmp_path: Path, nproc: int, name: str) -> None:
    shutil.copytree(finished.folder(), tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-2" / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    before = contents(tmp_path / "run")
    line = refusal(
        finished.start("--resume", "--train.steps=4", f"--nproc={nproc}", f"--run.folder={tmp_path / 'run'}")
    )
    assert f"{path} is damaged" in line
    assert contents(tmp_path / "run") == before


def test_a_full_disk_is_one_line_and_status_1(place: Place) -> None:
    def no_space() -> None:
        def fail(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        vars(writer)["write_pieces"] = fail

    command = place.start("--train.steps=2", before=no_space).wait()
    assert command.status == 1
    assert "Traceback" not in command.stderr
    assert [line for line in command.messages if "No space left on device" in line] == command.messages


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("error", [KeyError("memory"), ValueError("first\nsecond"), ConfigError("a page\nis damaged")])
def test_a_report_that_cannot_be_drawn_is_one_line_and_status_0(place: Place, nproc: int, error: Exception) -> None:
    def undrawable() -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        vars(cli)["report"] = fail

    command = place.start("--train.steps=2", "--json", f"--nproc={nproc}", before=undrawable).wait()
    assert command.status == 0
    assert command.document["step"] == 2
    assert "Traceback" not in command.stderr
    (line,) = command.messages
    assert command.stderr.endswith(line + "\n")
    assert line.startswith("megascale: no report: ")
    assert " ".join(str(error).split()) in line


# --- one rank of a job that a launcher started ---------------------------------------------------------------------


def launcher(**changes: object) -> dict[str, str]:
    values = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    return {name: str(value) for name, value in (values | changes).items()}


def test_a_port_in_use_is_refused(place: Place) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = occupied.getsockname()[1]
        command = place.start("--nproc=2", environment=launcher(MASTER_PORT=port)).wait()
    assert command.status == 2
    assert "Traceback" not in command.stderr
    (line,) = command.messages  # torch's own warnings stand above it
    assert f"rank 0: rendezvous at 127.0.0.1:{port} failed" in line
    assert "EADDRINUSE" in line


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "MASTER_PORT expected, but not set"),
        ({"RANK": "first"}, "environment variable RANK = 'first': must be a number"),
        ({"WORLD_SIZE": "-1"}, "environment variable WORLD_SIZE = '-1': must be a number"),
        ({"WORLD_SIZE": 3}, "is not divisible by parallel.node = 3"),
    ],
)
def test_a_launcher_that_left_nonsense_is_refused(place: Place, changes: dict[str, object], expected: str) -> None:
    assert expected in refusal(place.start(environment=launcher(**changes)))


@pytest.mark.parametrize(("local_rank", "lines"), [(0, 1), (1, 0)])
def test_one_rank_of_a_node_tells_what_all_of_it_see(place: Place, local_rank: int, lines: int) -> None:
    """Also on the nodes without rank 0: a config may be missing on one machine only."""
    command = place.start("--train.steps=0", environment=launcher(RANK=2 + local_rank, LOCAL_RANK=local_rank)).wait()
    assert command.status == 2
    assert len(command.messages) == lines


# --- ends that nobody wanted ---------------------------------------------------------------------------------------

LONG = ("--train.steps=100000", "--train.compile=off", "--train.eval_rows=0")


def training(place: Place, nproc: int) -> Command:
    """A run of local ranks that has done a step and would go on for long."""
    command = place.start(*LONG, f"--nproc={nproc}")
    metrics = place.folder() / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.stat().st_size > 0, "the first step is done")
    return command


@pytest.mark.parametrize("nproc", [1, 2])
@pytest.mark.parametrize("everyone", [True, False])
def test_interrupt_ends_everything_with_130(place: Place, nproc: int, everyone: bool) -> None:
    """Ctrl-C reaches the whole process group, `kill -INT` only the first process."""
    command = training(place, nproc)
    (os.killpg if everyone else os.kill)(command.pid, signal.SIGINT)
    ended = command.wait()
    assert ended.status == 130
    assert "Traceback" not in ended.stderr
    command.vanish()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ranks_do_not_outlive_the_process_that_started_them(place: Place, number: signal.Signals) -> None:
    command = training(place, 2)
    assert len(command.ranks()) == 2
    os.kill(command.pid, number)
    assert command.wait().status == -number
    command.vanish()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_ends_the_job_and_is_named(place: Place, rank: int) -> None:
    command = training(place, 2)
    os.kill(sorted(command.ranks())[rank], signal.SIGKILL)  # started in order; process ids do not wrap in a minute
    ended = command.wait()
    assert ended.status == 128 + signal.SIGKILL
    assert ended.messages == [f"megascale: rank {rank} was killed by SIGKILL; all ranks are ended"]
    assert "Traceback" not in ended.stderr  # that the others lost a peer is no news
    command.vanish()


def test_a_rank_that_raises_ends_the_job_and_is_named(place: Place) -> None:
    def install() -> None:
        def fail(self: Loop) -> None:
            if self.job.rank == 1:
                raise RuntimeError("a bug")

        Loop.evaluate = fail  # type: ignore[method-assign]

    command = place.start("--nproc=2", before=install)
    ended = command.wait()
    assert ended.status == 1
    assert ended.stderr.count("Traceback") == 1
    assert "RuntimeError: a bug" in ended.stderr
    assert ended.messages == ["megascale: rank 1 failed with exit status 1"]
    command.vanish()


# --- the network ---------------------------------------------------------------------------------------------------


def listening(pid: int) -> set[str]:
    """Addresses, in hexadecimal as the kernel lists them, that a process accepts connections on."""
    links = (os.readlink(path) for path in Path(f"/proc/{pid}/fd").iterdir() if path.is_symlink())
    own = {link.removeprefix("socket:[").removesuffix("]") for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        for row in (Path(f"/proc/{pid}/net") / table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = row.split()
            if state == "0A" and rest[5] in own:
                found.add(local.split(":")[0])
    return found


def test_local_ranks_listen_on_the_loopback_interface_only(place: Place) -> None:
    command = training(place, 2)
    addresses = [listening(pid) for pid in [command.pid, *command.ranks()]]
    assert any(addresses)  # gloo does listen, so the tables were read right
    assert set().union(*addresses) <= {"0100007F", "00000000000000000000000001000000"}  # 127.0.0.1 and ::1


# --- the program itself --------------------------------------------------------------------------------------------


def test_help_names_every_command_and_option() -> None:
    text = start("--help").wait().stdout
    for word in ("train", "doctor", "torchrun"):
        assert word in text
    text = start("train", "--help").wait().stdout
    for word in ("CONFIG.toml", "--section.key=value", "--nproc", "--resume", "--json", "130"):
        assert word in text


def test_the_compiler_is_not_imported_unless_used(place: Place) -> None:
    """It takes two seconds, which every `--help`, refusal and rank would pay."""
    code = "import sys; from megascale_moe.cli import main; sys.exit(main() or 'torch._dynamo' in sys.modules)"
    arguments = ("train", str(place.config), "--train.steps=1", "--json")
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["step"] == 1
