"""An engine behind asyncio: one thread steps it, any number of tasks wait for their outputs.

The thread is the only one that touches the engine. Tasks post commands (add, cancel, load weights), which it runs
between two steps. Weights are loaded when every started request has ended: none is of two versions.

A task may be cancelled at any moment. A command whose task left before it began is not run; the result of one that has
begun is dropped. No command's error reaches the thread: only a step's does, and then every caller is told.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from escala.contract.errors import EscalaError
from workloads.generation.protocol import (
    Completion,
    EngineProtocol,
    EngineStats,
    EngineStopped,
    Output,
    Request,
    SamplingParams,
    completion_of,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
U = TypeVar("U")
log = logging.getLogger(__name__)
SPEED_SECONDS = 10.0  # of stepping, over which tokens/s is a mean


class _Command:
    """Something that the engine's thread does once, and the future of who asked for it."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.done: Future[Any] = Future()
        self._action = action

    def run(self) -> None:
        """Do it, unless its caller has been cancelled."""
        if not self.done.set_running_or_notify_cancel():
            return
        try:
            result = self._action()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  of this command's own; who asked is told
            self.done.set_exception(error)
        else:
            self.done.set_result(result)

    def refuse(self, error: Exception) -> None:
        """It will not be done."""
        if self.done.set_running_or_notify_cancel():
            self.done.set_exception(error)


class Stepper:
    """Runs `engine` in a thread of its own, from the constructor until `close`. Make it inside the event loop."""

    def __init__(self, engine: EngineProtocol) -> None:
        self.engine = engine
        self.stats: EngineStats = engine.stats()
        self._loop = asyncio.get_running_loop()
        self._commands: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._loads: deque[_Command] = deque()
        self._waiting: dict[str, asyncio.Queue[Output | EngineStopped]] = {}
        self._ids = itertools.count()
        self._speed = SpeedMeter(self.stats)
        self._failure: EngineStopped | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def tokens_per_second(self) -> float:
        """Tokens read and generated in a second of stepping, lately; 0 before the first step."""
        return self._speed.tokens_per_second

    def check(self) -> None:
        """Raise EngineStopped where the thread has died: nothing more will be generated here."""
        if self._failure is not None:
            raise EngineStopped(self._failure.message, self._failure.hint)
        if not self._thread.is_alive():
            raise EngineStopped("The engine's thread has ended.", "Its log says why; replace it.")

    async def outputs(self, prompt: Sequence[int], params: SamplingParams) -> AsyncGenerator[Output]:
        """One request's outputs as they come. Leaving the iteration cancels it.

        Raises as `EngineProtocol.add`, the error that ended this request, or EngineStopped.
        """
        self.check()
        request = Request(f"r{next(self._ids)}", tuple(prompt), params)
        inbox = self._waiting[request.id] = asyncio.Queue()
        ended = False
        try:
            await self._call(lambda: self.engine.add(request))
            while not ended:
                output = await inbox.get()
                if isinstance(output, EngineStopped):
                    ended = True
                    raise output
                ended = output.error is not None or output.finish_reason is not None
                if output.error is not None:
                    raise output.error
                yield output
        finally:
            self._waiting.pop(request.id, None)
            if not ended:
                self._commands.put(_Command(lambda: self.engine.cancel(request.id)))

    async def complete(self, prompt: Sequence[int], params: SamplingParams) -> Completion:
        """One request's whole response. Raises as `EngineProtocol.add`."""
        async with aclosing(self.outputs(prompt, params)) as outputs:
            parts = [part async for part in outputs]
        return completion_of(parts)

    async def load(
        self, state: Mapping[str, Tensor] | None, version: int, capacity_factor: float | None = None
    ) -> None:
        """Load weights once the started requests have ended; those that wait run on the new ones. Who is cancelled
        while it waits takes the load back, unless it has begun.

        Args:
            state: None: the engine's own weights, as another version.
            capacity_factor: of a mixture, from then on; None: nothing is dropped.

        Raises as `EngineProtocol.load_weights` and `set_capacity_factor`, nothing changed then, or EngineStopped.
        """
        load = _Command(lambda: self._begin_version(state, version, capacity_factor))
        try:
            await self._call(lambda: self._loads.append(load))
            await asyncio.wrap_future(load.done)
        except asyncio.CancelledError:
            load.done.cancel()
            raise

    async def limit_running(self, requests: int) -> None:
        """See EngineProtocol. Raises EngineStopped."""
        await self._call(lambda: self.engine.limit_running(requests))

    def _begin_version(
        self, state: Mapping[str, Tensor] | None, version: int, capacity_factor: float | None
    ) -> None:
        self.engine.check_capacity_factor(capacity_factor)  # before weights are written
        if state is not None:
            self.engine.load_weights(state, version)
        self.engine.set_capacity_factor(capacity_factor, version)

    async def close(self) -> None:
        """End the thread after its present step; requests that have not ended raise EngineStopped."""
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    async def _call(self, action: Callable[[], T]) -> T:
        command = _Command(action)
        self._commands.put(command)
        self.check()  # a thread that died in between has seen its last command
        result: T = await asyncio.wrap_future(command.done)
        return result

    def _run(self) -> None:
        try:
            while self._obey():
                self._take_loads()
                outputs = self.engine.step(admit=not self._loads) if self.engine.has_work else []
                self.stats = self.engine.stats()
                self._speed.add(self.stats)
                if outputs:
                    self._tell(self._deliver, outputs)
            self._fail(EngineStopped("The engine was closed before the response was complete.", "Ask again."))
        except BaseException as error:
            log.exception("the engine has stopped")
            said = f"{type(error).__name__}: {error}"
            self._fail(
                EngineStopped(f"The engine has stopped: {said}.", "Ask again: its replica is replaced.")
            )

    def _obey(self) -> bool:
        """Run the commands that have come, waiting for one where nothing else is to do. False: close."""
        idle = not self.engine.has_work and not self._loads
        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command.run()
            idle = False

    def _take_loads(self) -> None:
        """Load what is asked for, once nothing of the old weights runs; a cancelled load delays nothing."""
        while self._loads and (self._loads[0].done.cancelled() or self.engine.stats().started == 0):
            load = self._loads.popleft()
            load.run()
            error = None if load.done.cancelled() else load.done.exception()
            if error is not None and not isinstance(error, EscalaError):
                raise error  # the weights may be half new: nothing may be generated with them

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            inbox = self._waiting.get(output.request_id)
            if inbox is not None:
                inbox.put_nowait(output)

    def _fail(self, error: EngineStopped) -> None:
        self._failure = error
        while not self._commands.empty():  # their callers must not wait indefinitely
            command = self._commands.get()
            if command is not None:
                command.refuse(error)
        for load in self._loads:
            load.refuse(error)
        self._tell(self._tell_all, error)

    def _tell_all(self, error: EngineStopped) -> None:
        for inbox in self._waiting.values():
            inbox.put_nowait(EngineStopped(error.message, error.hint))

    def _tell(self, what: Callable[[U], None], about: U) -> None:
        """Have `what` called in the event loop."""
        try:
            self._loop.call_soon_threadsafe(what, about)
        except RuntimeError:
            if not self._loop.is_closed():  # a closed loop has no callers left
                raise


class SpeedMeter:
    """Tokens per second of stepping, over the last `SPEED_SECONDS` of it: idle time is none."""

    def __init__(self, stats: EngineStats) -> None:
        self.tokens_per_second = 0.0
        self._marks: deque[tuple[float, int]] = deque([self._mark(stats)])

    @staticmethod
    def _mark(stats: EngineStats) -> tuple[float, int]:
        return stats.step_seconds, stats.prompt_tokens + stats.generated_tokens

    def add(self, stats: EngineStats) -> None:
        """The counters after a step."""
        seconds, tokens = self._mark(stats)
        if seconds - self._marks[-1][0] > SPEED_SECONDS / 20 or len(self._marks) == 1:
            self._marks.append((seconds, tokens))
        while len(self._marks) > 2 and seconds - self._marks[1][0] >= SPEED_SECONDS:
            self._marks.popleft()
        first_seconds, first_tokens = self._marks[0]
        if seconds > first_seconds:
            self.tokens_per_second = (tokens - first_tokens) / (seconds - first_seconds)
