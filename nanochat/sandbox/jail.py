"""The processes inside the sandbox: a launcher, the tester and the program.

    trainer                knows the nonce, kills everything at the deadline
      launcher             enters the namespaces
        tester             (pid 1 in there) forks the program, then learns tests and nonce
          program          runs what the model wrote, answers calls of its functions

The program never shares memory with the nonce or the tests: it is forked before they arrive.
Runs in a fresh interpreter (`python -I -S`); the only module of the project it may know is this
package. Standard library only.
"""

from __future__ import annotations

import builtins
import contextlib
import json
import os
import signal
import sys
import sysconfig
import traceback
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from nanochat.sandbox import layers, wire

_MESSAGE_CHARS = 2000  # kept of what a program or its tests say when they fail


class _ProgramError(Exception):
    """An exception of the program whose type the tester does not know; says which."""


class _ProgramEndedError(BaseException):
    """The program's process is gone; no `except Exception` of the tests may go on."""


class _Walls:
    """What protects, by name, and what could not be put up, with its reason."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.active: list[str] = []
        self.missing: list[str] = []
        self.scratch: str = options["scratch"]
        self.readable = layers.readable_paths(options["library_path"])
        # Read while there is a /proc.
        self.num_tasks = None if options["unsafe"] else layers.count_tasks()

    def put_up(self, name: str, layer: Callable[..., Any], *arguments: Any) -> None:
        """Try one layer and note how it went."""
        try:
            if name in self.options["without"]:
                raise OSError("switched off")
            layer(*arguments)
        except (OSError, ValueError) as error:
            self.missing.append(f"{name}: {error}")
        else:
            self.active.append(name)

    def confine(self) -> None:
        """Everything a process does to itself, in the order in which it is still allowed."""
        options = self.options
        if options["unsafe"]:
            self.missing.append("namespaces, privileges, landlock, seccomp: off, --unsafe")
        else:
            if os.getuid() == 0:
                self.put_up("user nobody", layers.become_nobody, self.scratch, self.readable)
            self.put_up("no capabilities", layers.drop_capabilities)
        limits = [options[name] for name in ("seconds", "memory_bytes", "scratch_bytes")]
        self.put_up("resource limits", layers.limit_resources, *limits, self.num_tasks)
        self.put_up("dies with its parent", layers.die_with_parent)
        if not options["unsafe"]:
            self.put_up("no huge pages", layers.forbid_huge_pages)
            self.put_up("no_new_privs", layers.forbid_new_privileges)
            is_private = "private root" in self.active
            landlock = partial(layers.landlock, may_remove=is_private)
            self.put_up("landlock", landlock, self.scratch, self.readable)
            # Where nothing else keeps the user's files apart, none is opened for writing.
            may_write = "landlock" in self.active or is_private
            if not may_write:
                self.missing.append("scratch folder: without landlock or private root, read-only")
            self.put_up("seccomp", partial(layers.filter_system_calls, may_write=may_write))

    @property
    def problem(self) -> str | None:
        """Why nothing may run behind these walls, or None.

        Without seccomp and pid namespace a program may end its user's other processes; without
        seccomp and private root it may change modes and times of files, which Landlock permits.
        """
        if self.options["unsafe"] or "seccomp" in self.active or "private root" in self.active:
            return None
        missing = "; ".join(self.missing)
        if "pid namespace" not in self.active:
            return f"neither of seccomp and pid namespace works here ({missing})"
        return f"without seccomp or a private root files can be changed ({missing})"


def main(options_json: str) -> NoReturn:
    """Run one request. Standard input: the request; descriptor options["verdict"]: the answer."""
    options = json.loads(options_json)
    os.chdir(options["scratch"])
    walls = _Walls(options)
    verdict = options["verdict"]
    if not options["unsafe"]:
        walls.put_up("pid namespace", layers.enter_namespaces)
    # The trainer may be killed before it kills. After the namespaces, which would reset it.
    walls.put_up("dies with the trainer", layers.die_with_parent)
    if os.getppid() != options["trainer"]:
        os._exit(1)  # it ended before that
    child = os.fork()
    if child == 0:
        _guarded(_be_tester, walls, verdict)
    for descriptor in (0, 1, 2, verdict):
        os.close(descriptor)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def _guarded(run: Callable[..., None], *arguments: Any) -> NoReturn:
    """A forked process never returns into the code of its parent."""
    try:
        run(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


# ---- the tester ----------------------------------------------------------------------------------


def _be_tester(walls: _Walls, verdict: int) -> None:
    if "pid namespace" in walls.active:
        root, scratch_bytes = Path(walls.options["root"]), walls.options["scratch_bytes"]
        walls.put_up("private root", layers.enter_private_root, root, walls.readable, scratch_bytes)
        if "private root" in walls.active:
            walls.scratch = layers.SCRATCH
    requests, answers = os.pipe(), os.pipe()
    program = os.fork()
    if program == 0:
        for descriptor in (requests[1], answers[0], verdict):
            os.close(descriptor)
        _guarded(_be_program, walls, requests[0], answers[1])
    os.close(requests[0])
    os.close(answers[1])
    # The program's output goes to the trainer, that of the tests nowhere.
    silence = os.open("/dev/null", os.O_WRONLY)
    os.dup2(silence, 1)
    walls.confine()
    with open(0, "rb") as stream:
        request = json.loads(stream.read())
    channel = _Program(program, requests[1], answers[0])
    try:
        theirs = channel.hear()
        walls.active = [name for name in walls.active if name in theirs["active"]]
        walls.missing = list(dict.fromkeys([*walls.missing, *theirs["missing"]]))
        _report(verdict, {"active": walls.active, "missing": walls.missing})
        outcome = {"refused": walls.problem} if walls.problem else _judge(channel, request)
    except wire.ChannelClosedError as error:
        outcome = {"error": f"the program's process cannot be heard: {error}"}
    _report(verdict, {"nonce": request["nonce"], **outcome})


def _report(verdict: int, line: dict[str, Any]) -> None:
    os.write(verdict, json.dumps(line).encode("ascii") + b"\n")


def _judge(program: _Program, request: dict[str, Any]) -> dict[str, Any]:
    """Run the program, then its tests: {"passed": True} or {"error": what}."""
    try:
        program.ask({"program": request["program"], "as_main": request["tests"] is None})
        if request["tests"] is not None:
            _run_tests(program, request)
    except _ProgramEndedError as error:
        return {"error": str(error)}
    except BaseException as error:
        return {"error": _describe(error, request)}
    return {"passed": True} if program.ending is None else {"error": program.ending}


def _run_tests(program: _Program, request: dict[str, Any]) -> None:
    # exec is what this process is for: it stands behind the walls, and ends with the program.
    namespace: dict[str, Any] = {"__name__": "__tests__"}
    exec(compile(request["prelude"], "<prelude>", "exec"), namespace)
    for name in request["functions"]:
        namespace[name] = program.function(name)
    exec(compile(request["tests"], "<tests>", "exec"), namespace)


def _describe(error: BaseException, request: dict[str, Any]) -> str:
    """Type and message, and the line of the tests that did not hold."""
    text = str(error)[:_MESSAGE_CHARS]
    if not isinstance(error, _ProgramError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    lines = (request["tests"] or "").splitlines()
    frames = traceback.extract_tb(error.__traceback__)
    numbers = [frame.lineno for frame in frames if frame.filename == "<tests>" and frame.lineno]
    if not numbers:
        return text
    return f"{text} (line {numbers[-1]} of the tests: {lines[numbers[-1] - 1].strip()})"


class _Program:
    """The program's process as the tester sees it."""

    def __init__(self, process: int, requests: int, answers: int) -> None:
        self._process, self._requests, self._answers = process, requests, answers
        self.ending: str | None = None

    def function(self, name: str) -> Callable[..., Any]:
        """A stand-in for one of the program's functions."""

        def call(*arguments: Any, **named: Any) -> Any:
            content = [wire.encode(list(arguments)), wire.encode(named)]
            if '["opaque", ' in json.dumps(content):
                raise TypeError(f"the tests give {name} a value that cannot enter the sandbox")
            return self.ask({"call": name, "with": content})

        call.__name__ = name
        return call

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and wait for its result, or raise what the program raised."""
        if self.ending is not None:
            raise _ProgramEndedError(self.ending)
        try:
            wire.send(self._requests, request)
            answer = self.hear()
        except wire.ChannelClosedError:
            self.ending = self._wait()
            raise _ProgramEndedError(self.ending) from None
        try:
            if "raised" not in answer:
                return wire.decode(answer["result"])
            name, message = answer["raised"]
            known = getattr(builtins, str(name), None)
            is_ordinary = isinstance(known, type) and issubclass(known, Exception)
        except (ValueError, TypeError, KeyError, LookupError, RecursionError) as error:
            raise _ProgramError(f"the program answered with no value: {error!r}") from None
        if is_ordinary and known is not None:
            try:
                raised = known(str(message))
            except TypeError:  # UnicodeDecodeError and its like want more than a message
                raised = _ProgramError(f"{name}: {message}")
            raise raised
        raise _ProgramError(f"{name}: {message}" if message else str(name))

    def hear(self) -> dict[str, Any]:
        """The program's next frame."""
        answer = wire.receive(self._answers)
        if not isinstance(answer, dict):
            raise wire.ChannelClosedError("not an answer")
        return answer

    def _wait(self) -> str:
        """How the program's process ended; waits for it, if need be until the deadline."""
        _, status = os.waitpid(self._process, 0)
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"the program ended its process with exit code {code}"
        return f"the program was killed by {signal.Signals(-code).name}"


# ---- the program ---------------------------------------------------------------------------------


def _be_program(walls: _Walls, requests: int, answers: int) -> None:
    nothing = os.open("/dev/null", os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    walls.confine()
    os.environ.clear()
    home = {"HOME": walls.scratch, "TMPDIR": walls.scratch, "PATH": "/usr/bin:/bin"}
    os.environ.update(home, LANG="C.UTF-8", OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    packages = [sysconfig.get_paths()[name] for name in ("purelib", "platlib")]
    sys.path[:] = [path for path in sys.path if path != walls.options["source"]]
    sys.path += [path for path in dict.fromkeys(packages) if path not in sys.path]
    wire.send(answers, {"active": walls.active, "missing": walls.missing})
    module = types.ModuleType("__main__")
    while True:
        try:
            request = wire.receive(requests)
        except wire.ChannelClosedError:
            return
        answer = _answer(request, module)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):  # the program may have closed or replaced it
                stream.flush()
        wire.send(answers, answer)


def _answer(request: dict[str, Any], module: types.ModuleType) -> dict[str, Any]:
    try:
        if "call" in request:
            positional, named = request["with"]
            function = module.__dict__[request["call"]]
            return {"result": wire.encode(function(*wire.decode(positional), **wire.decode(named)))}
        if request["as_main"]:
            sys.modules["__main__"] = module
        else:
            # A model's own demonstration below `if __name__ == "__main__"` is no part of it.
            module.__name__ = "program"
            sys.modules["program"] = module
        exec(compile(request["program"], "<program>", "exec"), module.__dict__)
    except KeyError as error:
        if "call" in request and request["call"] not in module.__dict__:
            return {"raised": ["NameError", f"the program defines no {request['call']}"]}
        return {"raised": ["KeyError", str(error)]}
    except BaseException as error:
        if request.get("as_main") and error.__traceback__:
            # Without this module's own frame.
            traceback.print_exception(type(error), error, error.__traceback__.tb_next)
        # A library's may have a name of its own.
        is_memory = issubclass(type(error), MemoryError)
        name = "MemoryError" if is_memory else type(error).__name__
        return {"raised": [name, _message(error)]}
    return {"result": None}


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as second:  # the program's own __str__
        return f"(its message cannot be shown: {type(second).__name__})"
