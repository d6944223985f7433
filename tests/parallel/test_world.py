"""How processes fail together: a group of one, and answers of a larger group that are played.

Real groups are hurt in tests/training/test_faults.py.
"""

import signal

import pytest

from lumi.config import UserError
from lumi.host.interruption import Interrupted, StopSignal
from lumi.parallel.process_group import process_group


@pytest.fixture
def world():
    with StopSignal() as stop, process_group("cpu", stop=stop) as world:
        yield world


def test_one_process_is_a_world(world):
    assert (world.rank, world.size, world.is_main, world.data_rank) == (0, 1, True, 0)
    assert world.sum(1, 2.5) == [1.0, 2.5]
    assert world.gather({"a": 1}) == [{"a": 1}]


def test_one_process_exchanges_nothing(monkeypatch, world):
    for name in ("all_reduce", "all_gather_object"):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda *_, **__: pytest.fail("an exchange"))
    monkeypatch.setattr("torch.tensor", lambda *_, **__: pytest.fail("a tensor"))
    assert world.sum(3, world.stop.received) == [3.0, 0.0]
    assert world.gather("a") == ["a"]
    with world.fail_together():
        pass


def test_work_that_fails_raises_a_user_error(world):
    with world.fail_together():
        value = 1
    assert value == 1
    error = UserError("--port", "must be positive", got=0, remedy="pass another")
    with pytest.raises(UserError) as caught, world.fail_together():
        raise error
    assert caught.value.remedy == "pass another"
    with pytest.raises(UserError, match="No space left on device"), world.fail_together():
        raise OSError(28, "No space left on device")


def test_a_bug_is_no_error_of_the_user(world):
    with pytest.raises(ZeroDivisionError), world.fail_together():
        raise ZeroDivisionError


def test_a_signal_ends_interruptible_work_alone(world):
    with world.fail_together():
        signal.raise_signal(signal.SIGTERM)
    assert world.stop.received == signal.SIGTERM
    with pytest.raises(Interrupted), world.fail_together(interruptible=True):
        pytest.fail("a signal that came before ends the block at once")


def test_all_end_with_the_first_message(monkeypatch, world):
    """What the group would answer is played."""
    faults = [UserError("rank 0 must read its data, got none"), UserError("rank 1 likewise")]
    monkeypatch.setattr(type(world), "gather", lambda self, value: [value, faults[1]])
    monkeypatch.setattr(type(world), "_any", lambda self, value: True)

    def fail(fault=None):
        with world.fail_together():
            if fault:
                raise fault

    with pytest.raises(UserError, match="rank 0"):
        fail(faults[0])
    with pytest.raises(UserError, match="rank 1"):
        fail()
    faults[1] = Interrupted(signal.SIGTERM)
    with pytest.raises(Interrupted):
        fail()
    faults[1] = UserError("rank 1 likewise")
    monkeypatch.setattr(type(world), "is_main", False)
    with pytest.raises(SystemExit) as left:
        fail()
    assert left.value.code == 2


def test_counts_are_exact(world):
    assert world.sum(2**53 - 1) == [float(2**53 - 1)]
