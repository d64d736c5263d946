"""Runs in processes of their own: killed, interrupted, and spread over two gloo ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from toy_task import ToyTask, toy_config, toy_yaml

from samdistill.engine import Checkpoint, fit, launch, newest, read_lines
from samdistill.engine.launch import _config
from samdistill.engine.schedule import GlobalBatches, Shard
from samdistill.types import UserError

TOY = Path(__file__).with_name("toy_task.py")
LIMIT = 600
"""Seconds after which a process hangs: a busy machine needs many for what takes one."""
QUIET = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Sums over other numbers of threads differ in the last bits; the processes started here have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start(run, *args):
    path = os.pathsep.join(p for p in sys.path if p)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(TOY), str(run), *args], env=env, **QUIET)


def wait_for_step(process, run, step, limit=LIMIT):
    end = time.monotonic() + limit
    while not any(line["step"] >= step for line in read_lines(run / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end, process.communicate()[1]
        time.sleep(0.02)


def train(run, task=None, resume=None):
    config = toy_config()
    return fit(task or ToyTask(), config, run, resume, 0, toy_yaml(config))


def weights(run, name="ckpt_epoch_3.pt"):
    saved = Checkpoint.load(run / name)
    return {**saved.model, **{f"adam {i} {k}": v for i, s in saved.optimizer["state"].items() for k, v in s.items()}}


def assert_same(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def terms(run):
    return [line["terms"] for line in read_lines(run / "metrics.jsonl") if "terms" in line]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    train(run)
    return run


THAWED = {"freeze": [{"match": ["0.*", "1.*"], "until": 1}, {"match": ["4.bias"]}], "weight_decay": 0.3, "ema": 0.9,
          "accumulate": 2}  # fmt: skip
"""The first convolution and its batch norm train from the second epoch on, the last bias never."""
SELDOM = {"norm": "group", "leaves_unused": True}


@pytest.fixture(scope="module")
def runs_on_two_ranks(tmp_path_factory):
    """Three runs by one start of the processes: as it is, through an unfreeze, and with a parameter seldom needed."""
    root = tmp_path_factory.mktemp("ranks")
    first, *others = (
        (str(root / name), "dropout=0", *(f"{key}={value}" for key, value in changes.items()))
        for name, changes in {"run": {}, "thawed": THAWED, "seldom": SELDOM}.items()
    )
    process = start(*first, "--nproc", "2", *(word for other in others for word in ("--then", *other)))
    assert process.wait(LIMIT) == 0, process.stderr.read()
    return root


@pytest.fixture(scope="module")
def two_ranks(runs_on_two_ranks):
    return runs_on_two_ranks / "run"


def test_kill_in_the_middle_then_resume_ends_in_the_same_bits(tmp_path, whole):
    run = tmp_path / "run"
    process = start(run, "delay=0.03", "workers=1")
    wait_for_step(process, run, 8)
    with pytest.raises(UserError, match=rf"run: samdistill train \(process {process.pid} on .* is writing here"):
        train(run)
    process.send_signal(signal.SIGKILL)
    assert process.wait(LIMIT) == -signal.SIGKILL and not (run / "ckpt_epoch_3.pt").exists()
    train(run)
    assert_same(run, whole)
    assert terms(run) == terms(whole), "every step is logged once"


def test_signal_in_the_middle_of_an_epoch_saves_it_and_exits_with_130(tmp_path, whole):
    run = tmp_path / "run"
    process = start(run, "delay=0.03", "workers=1")
    wait_for_step(process, run, 7)
    process.send_signal(signal.SIGTERM)
    assert process.wait(LIMIT) == 130
    assert "Traceback" not in (said := process.stderr.read()) and "the same command goes on" in said
    assert Checkpoint.load(run / "ckpt_interrupt.pt").step in (7, 8, 9)
    train(run)
    assert_same(run, whole)


def test_two_gloo_ranks_give_the_losses_of_one_process(tmp_path, two_ranks):
    """Batch norm included: its statistics are shared over the ranks."""
    train(tmp_path, ToyTask(dropout=0.0))
    one, two = terms(tmp_path), terms(two_ranks)
    assert len(one) == len(two) == 15
    assert max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in a) < 1e-4
    a, b = weights(tmp_path), weights(two_ranks)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert len(Checkpoint.load(two_ranks / "ckpt_epoch_3.pt").rng) == 2 and (two_ranks / "log_rank1.txt").exists()


def test_ctrl_c_on_the_launcher_saves_on_all_ranks_and_resumes_in_the_same_bits(tmp_path, two_ranks):
    """Started as ``nohup`` starts it, it outlives the end of its terminal before."""
    run = tmp_path / "run"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start(run, "--nproc", "2", "dropout=0", "delay=0.03")
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_step(process, run, 3)
    process.send_signal(signal.SIGHUP)
    wait_for_step(process, run, 7)
    process.send_signal(signal.SIGINT)
    assert process.wait(LIMIT) == 130
    said = process.stderr.read()
    assert not any(word in said for word in ("Traceback", "death signal")) and (run / "ckpt_interrupt.pt").exists()
    again = start(run, "--nproc", "2", "dropout=0")
    assert again.wait(LIMIT) == 0, again.stderr.read()
    assert_same(run, two_ranks)


def ranks_of(launcher):
    """Process ids of the ranks a launcher started, by rank."""
    found = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == launcher.pid:
                environment = dict(e.partition("=")[::2] for e in (status.parent / "environ").read_text().split("\0"))
                found[int(environment["RANK"])] = int(status.parent.name)
        except (OSError, KeyError):
            continue
    return found


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")


@needs_proc
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_is_named_with_its_signal(tmp_path, rank):
    process = start(tmp_path / "run", "--nproc", "2", "dropout=0", "delay=0.03")
    wait_for_step(process, tmp_path / "run", 2)
    os.kill(ranks_of(process)[rank], signal.SIGKILL)
    assert process.wait(LIMIT) == 128 + signal.SIGKILL
    said = process.stderr.read()
    assert f"rank {rank} was killed by signal 9 (SIGKILL), probably out of memory" in said and "Traceback" not in said


@needs_proc
def test_the_ranks_of_a_launcher_that_is_killed_save_and_end(tmp_path):
    run = tmp_path / "run"
    process = start(run, "--nproc", "2", "dropout=0", "delay=0.05", "epochs=200")
    wait_for_step(process, run, 2)
    ranks = ranks_of(process)
    assert sorted(ranks) == [0, 1]
    process.send_signal(signal.SIGKILL)
    process.wait(LIMIT)
    end = time.monotonic() + LIMIT
    while any(map(is_alive, ranks.values())):
        assert time.monotonic() < end, "the ranks train on"
        time.sleep(0.05)
    assert Checkpoint.load(newest(run)).step >= 2


def test_ranks_take_no_module_from_the_current_folder(tmp_path):
    """``html`` is imported by the standard library, and was executed from where the command was called."""
    (tmp_path / "html.py").write_text("import pathlib; pathlib.Path(__file__).with_name('ran').touch()")
    path = os.pathsep.join(p for p in sys.path if p)
    code = "import sys; from samdistill.engine import launch; sys.exit(launch(2, ['models', 'es_ev_s']))"
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env={**os.environ, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True,
        text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0 and "efficientvit_b0" in done.stdout, done.stderr
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("fault", "words"), [("nan", "loss term cosine = nan"), ("rank1", "image 7 cannot be read")])
def test_an_error_of_any_rank_is_one_message_and_exit_code_2(tmp_path, fault, words):
    process = start(tmp_path / "run", "--nproc", "2", f"broken={fault}", "at=1")
    assert process.wait(LIMIT) == 2
    said = process.stderr.read()
    assert said.count(words) == 1 and "Traceback" not in said and "ChildFailedError" not in said, said


def one_like_two(alone, ranks, task, **changes):
    """Train on one process and compare with two: all terms, and the weights and their average after each epoch."""
    config = toy_config(**changes)
    fit(task, config, alone, None, 0, toy_yaml(config))
    for a, b in zip(terms(alone), terms(ranks), strict=True):
        assert a == pytest.approx(b, abs=1e-4)
    for epoch in (1, 3):
        a, b = (Checkpoint.load(run / f"ckpt_epoch_{epoch}.pt") for run in (alone, ranks))
        for one, two in [(a.model, b.model), (a.ema or {}, b.ema or {})]:
            assert one.keys() == two.keys() and all(torch.allclose(one[k], two[k], atol=1e-4) for k in one)


def test_two_ranks_train_like_one_through_an_unfreeze(tmp_path, runs_on_two_ranks):
    """In micro-batches, with a batch norm over both ranks that is frozen at first."""
    ranks = runs_on_two_ranks / "thawed"
    one_like_two(tmp_path, ranks, ToyTask(dropout=0.0), **THAWED)
    torch.manual_seed(0)
    start, (first, last) = (
        ToyTask().build_student().state_dict(),
        (weights(ranks, f"ckpt_epoch_{n}.pt") for n in (1, 3)),
    )
    frozen = [name for name in start if name.startswith(("0.", "1."))]
    assert len(frozen) == 6 and all(torch.equal(first[name], start[name]) for name in frozen)
    assert not torch.equal(last["0.weight"], start["0.weight"]) and torch.equal(last["4.bias"], start["4.bias"])


def test_two_ranks_with_a_parameter_that_a_batch_leaves_out(tmp_path, runs_on_two_ranks):
    """One rank, both or none needs it: they neither wait for each other nor differ from one process."""
    needed = [
        [sum(i % 6 == 0 for i in batch) for batch in GlobalBatches(22, Shard(4, 1, rank, 2), 0, 0)] for rank in range(2)
    ]
    both = list(zip(*needed, strict=True))
    assert any(min(pair) == 0 < max(pair) for pair in both), "the case that waits for ever unless it is told"
    one_like_two(tmp_path, runs_on_two_ranks / "seldom", ToyTask(dropout=0.0, **SELDOM))
    first, last = (weights(tmp_path, f"ckpt_epoch_{n}.pt") for n in (1, 3))
    assert not torch.equal(first["extra.weight"], last["extra.weight"])


def test_a_run_on_two_ranks_goes_on_on_one(tmp_path, two_ranks):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("ckpt_epoch_2.pt", "config.yaml"):
        (run / name).write_bytes((two_ranks / name).read_bytes())
    config = toy_config()
    saved = Checkpoint.load(run / "ckpt_epoch_2.pt")
    assert saved.config == toy_yaml(config)
    fit(ToyTask(dropout=0.0), config, run, None, 0, toy_yaml(config))
    a, b = weights(run), weights(two_ranks)
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in a)
    assert "saved on 2 rank(s), resumed on 1" in (run / "log_rank0.txt").read_text()


def environment(monkeypatch, **values):
    for name in ("NNODES", "NODE_RANK", "RDZV_BACKEND", "RDZV_ENDPOINT", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("values", "nodes", "backend", "endpoint", "configs"),
    [
        ({}, 1, "c10d", "127.0.0.1:0", {}),
        ({"MASTER_PORT": "29511"}, 1, "static", "127.0.0.1:29511", {"rank": 0}),
        ({"NNODES": "2", "RDZV_ENDPOINT": "h:1"}, 2, "c10d", "h:1", {}),
        ({"NNODES": "3", "RDZV_ENDPOINT": "h:1", "RDZV_BACKEND": "etcd-v2"}, 3, "etcd-v2", "h:1", {}),
        ({"NNODES": "2", "MASTER_ADDR": "h", "MASTER_PORT": "5", "NODE_RANK": "1"}, 2, "static", "h:5", {"rank": 1}),
    ],
)
def test_the_launcher_honours_the_environment(monkeypatch, tmp_path, values, nodes, backend, endpoint, configs):
    environment(monkeypatch, **values)
    config = _config(4, str(tmp_path))
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (nodes, nodes, 4)
    assert (config.rdzv_backend, config.rdzv_endpoint) == (backend, endpoint)
    assert {k: v for k, v in config.rdzv_configs.items() if k == "rank"} == configs


def test_launcher_settings_that_cannot_work_are_refused(monkeypatch, tmp_path):
    environment(monkeypatch, NNODES="2")
    with pytest.raises(UserError, match="RDZV_ENDPOINT"):
        _config(1, str(tmp_path))
    environment(monkeypatch, NNODES="two")
    with pytest.raises(UserError, match="NNODES='two'"):
        _config(1, str(tmp_path))
    with pytest.raises(UserError, match="--nproc 0"):
        launch(0, [])
