"""The two fields of an error."""

import pickle

import pytest

from pykvm.errors import PykvmError

pytestmark = pytest.mark.unit


class FileGoneError(PykvmError):
    """An error whose constructor takes other arguments."""

    def __init__(self, path: str, *, tries: int) -> None:
        super().__init__(f"{path} is gone", "create it again")
        self.path = path
        self.tries = tries


def test_an_error_joins_problem_and_next_step() -> None:
    error = PykvmError("the disk is full", "free some space")
    assert (error.problem, error.next_step) == ("the disk is full", "free some space")
    assert str(error) == "the disk is full: free some space"


def test_an_error_without_a_next_step_is_its_problem() -> None:
    error = PykvmError("port 3: the guest asserts x == 1")
    assert error.next_step == ""
    assert str(error) == "port 3: the guest asserts x == 1"


def test_an_error_survives_pickling_whatever_its_constructor_takes() -> None:
    error = FileGoneError("/a", tries=3)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is FileGoneError
    assert (again.path, again.tries, str(again)) == ("/a", 3, str(error))
    assert again.args == error.args
