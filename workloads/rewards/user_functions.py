"""A user's reward function in a process of its own, which can be ended: one that never returns, calls sys.exit or
crashes is that function's error, whatever it holds (a regular expression that backtracks holds Python's lock).

`python -m workloads.rewards.user_functions R W` is that process: it reads JSON lines from file descriptor R (first
what to import, then calls) and answers each on W. What the function prints goes where its worker's output goes.

The submit directory's modules (ESCALA_CODE) stand last on the path: they never hide escala, torch or Python's own.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from escala.contract.errors import SpecError, StateError
from escala.contract.records import TEXT_CHARACTERS
from escala.contract.redaction import print_exception
from workloads.generation.protocol import FP32_MAX

CODE = "ESCALA_CODE"  # the directory of the user's modules (escala.storage.user_code)
IMPORT_SECONDS = 120.0  # a module may import torch on a busy machine
ALARM_SECONDS = 10.0  # after its limit a process that nobody ended (its worker was killed) ends by itself
HINT = "Submit from the directory that holds the module, or give it by --code."
CORRECT = "Correct the module; importing it should only define functions."


class UserFunction:
    """`package.module:function` in its own process, which stays between calls and is started again once it has ended.

    Raises SpecError where the function can't be imported, takes no (prompts, responses), raises, or does not return a
    finite number for each response; StateError where it takes longer than `timeout_seconds`.
    """

    def __init__(self, name: str, timeout_seconds: float = 600.0) -> None:
        self.name, self.timeout_seconds = name, timeout_seconds
        self._process = _Process(name)

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[str], timeout_seconds: float | None = None
    ) -> list[float]:
        """A finite number for each response."""
        limit = self.timeout_seconds if timeout_seconds is None else timeout_seconds
        if not self._process.alive:
            self._process = _Process(self.name)
        found = self._process.ask([list(prompts), list(responses), limit], limit)
        return [float(value) for value in found]

    def close(self) -> None:
        """End the process."""
        self._process.end()


class _Process:
    """The function's process, its module imported."""

    def __init__(self, name: str) -> None:
        self._name = name
        requests, self._to = os.pipe()
        self._from, answers = os.pipe()
        command = [
            sys.executable,
            "-u",
            "-P",
            "-m",
            "workloads.rewards.user_functions",
            str(requests),
            str(answers),
        ]
        root = str(Path(__file__).parents[2])
        path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
        self._child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            pass_fds=(requests, answers),
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # so that what it starts ends with it
        )
        os.close(requests)
        os.close(answers)
        self.end = weakref.finalize(self, _end, self._child, (self._to, self._from))
        self.ask([name, [entry for entry in sys.path if entry]], IMPORT_SECONDS, "was not imported")

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self.end.alive and self._child.poll() is None

    def ask(self, request: Any, seconds: float, late: str = "did not return") -> Any:
        """Its answer. Any failure but an error that it reports itself ends it."""
        try:
            answer = self._exchange(json.dumps(request).encode() + b"\n", seconds)
        except TimeoutError:
            self.end()
            raise StateError(
                f"The reward function {self._name} {late} within {seconds:.3g} s.",
                "Make it faster, or raise rollouts.timeout_seconds, then submit it again."
                if late == "did not return"
                else "Let the module do less when it is imported.",
            ) from None
        except (OSError, EOFError):
            self._child.wait(10)
            code = self._child.returncode
            self.end()
            how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
            raise SpecError(
                f"The reward function {self._name} ended its process {how}.", "Correct the function."
            ) from None
        if "error" in answer:
            raise SpecError(answer["error"], answer["hint"])
        return answer["value"]

    def _exchange(self, line: bytes, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        os.set_blocking(self._to, False)
        while line:
            self._wait([], [self._to], deadline)
            line = line[os.write(self._to, line) :]
        found = b""
        while not found.endswith(b"\n"):
            self._wait([self._from], [], deadline)
            part = os.read(self._from, 1 << 20)
            if not part:
                raise EOFError
            found += part
        return json.loads(found)

    @staticmethod
    def _wait(read: list[int], write: list[int], deadline: float) -> None:
        if not any(select.select(read, write, [], max(0.0, deadline - time.monotonic()))):
            raise TimeoutError


def _end(child: subprocess.Popen[bytes], descriptors: tuple[int, int]) -> None:
    for descriptor in descriptors:
        os.close(descriptor)
    if child.poll() is None:
        with suppress(ProcessLookupError):  # it has just ended
            os.killpg(child.pid, signal.SIGKILL)
    child.wait()


# The process


def import_function(name: str) -> Callable[..., Any]:
    """The function, its module imported. Raises SpecError, whatever the module does."""
    module_name, _, attribute = name.partition(":")
    code = os.environ.get(CODE)
    if code and code not in sys.path:
        sys.path.append(code)
    try:
        module = importlib.import_module(module_name)
        _check_origin(name, module, code)
    except SpecError:
        raise
    except BaseException as error:
        raise SpecError(
            f"The reward function {name} can't be imported: {type(error).__name__}: {error}"[
                :TEXT_CHARACTERS
            ],
            HINT if isinstance(error, ModuleNotFoundError) else CORRECT,
        ) from error
    function: Any = getattr(module, attribute, None)
    if not callable(function):
        said = (
            f"is no function but {type(function).__name__}" if hasattr(module, attribute) else "is not there"
        )
        raise SpecError(f"The reward function {name} {said}.", f"Name a function that {module_name} defines.")
    if any(map(_is_async, (function, getattr(function, "__call__", None)))):  # noqa: B004 - of an instance
        raise SpecError(f"The reward function {name} is a coroutine.", "Write it with def, not async def.")
    try:
        inspect.signature(function).bind([], [])
    except TypeError as error:
        raise SpecError(
            f"The reward function {name}{inspect.signature(function)} can't be called as function(prompts, responses): "
            f"{error}.",
            "Let it take the two lists and return a number for each response.",
        ) from error
    except ValueError:
        pass  # built in, and without a signature
    found: Callable[..., Any] = function
    return found


def _is_async(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def _check_origin(name: str, module: Any, code: str | None) -> None:
    """Raise SpecError where the user's module is hidden by another one of its name."""
    root = name.partition(":")[0].partition(".")[0]
    mine = code and ((Path(code) / root).is_dir() or (Path(code) / f"{root}.py").is_file())
    file = getattr(module, "__file__", None)
    if mine and not (file and _is_copy(Path(file).resolve(), module.__name__, Path(str(code)).resolve())):
        raise SpecError(
            f"The reward function {name} is in your {root}, but {file or 'Python itself'} has the same name and goes "
            "first.",
            f"Rename your {root}.",
        )


def _is_copy(file: Path, module_name: str, code: Path) -> bool:
    """Whether a module's file is in the user's copy, or is what was copied (a project installed in editable mode)."""
    if file.is_relative_to(code):
        return True
    place = code.joinpath(*module_name.split("."))
    copies = (path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file())
    return any(path.read_bytes() == file.read_bytes() for path in copies)


def numbers(name: str, found: list[Any], count: int) -> list[float]:
    """What the function returned as floats. Raises SpecError."""
    if len(found) != count:
        raise SpecError(
            f"The reward function {name} returned {len(found)} rewards for {count} responses.",
            "Return one number for each response.",
        )
    return [_number(name, index, value) for index, value in enumerate(found)]


def _number(name: str, index: int, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not abs(number) <= FP32_MAX:
        raise SpecError(
            f"The reward function {name} returned {repr(value)[:100]} for response {index + 1}.",
            "Return a number for each response that is finite in fp32.",
        )
    return number


def _call(name: str, function: Callable[..., Any], request: list[Any]) -> list[float]:
    prompts, responses, limit = request
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, limit + ALARM_SECONDS)
    try:
        found = list(function(prompts, responses))
    except BaseException as error:
        print_exception(error)
        raise SpecError(
            f"The reward function {name} raised {type(error).__name__}: {error}"[:TEXT_CHARACTERS],
            "Correct the function; the log has the traceback.",
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return numbers(name, found, len(responses))


def _answer(work: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": work()}
    except SpecError as error:
        return {"error": error.message, "hint": error.hint}


def main(requests: int, answers: int) -> None:
    """Import the function, then call it as asked, until the other end closes."""
    with os.fdopen(requests, "rb") as lines, os.fdopen(answers, "wb", buffering=0) as out:
        name, path = json.loads(lines.readline())
        sys.path += [entry for entry in path if entry not in sys.path]
        functions: list[Callable[..., Any]] = []
        answer = _answer(lambda: functions.append(import_function(name)))
        out.write(json.dumps(answer).encode() + b"\n")
        for line in lines if functions else ():
            answer = _answer(partial(_call, name, functions[0], json.loads(line)))
            out.write(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
