"""Command line -> frozen dataclass. The only reader of sys.argv.

A command declares its flags as the fields of a dataclass; tyro builds the object and the
help text. Before that, this module forgives what the documented commands mix:

- `--max_seq_len=512`, `--max-seq-len 512`, a stray leading `--` left by torchrun;
- whole floats for integers (`--num_iterations=1e3`) and integers for floats;
- `--flag`, `--flag=1`, `--flag=True`, `--no-flag`;
- a positional file of `key = literal` lines, read (never executed) before the flags.

A config class may say in `PRESETS` that a value of one flag stands for values of others:
`{"recipe": {"merged": {"source": "base"}}}`. They come before the file and the flags.

A field of the type `Rest` takes what follows a bare `--`, for a command that starts others.

What cannot be forgiven ends with one line and exit code 2.
"""

import ast
import dataclasses
import difflib
import errno
import os
import select
import signal
import stat
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import (
    Annotated,
    Any,
    Literal,
    NoReturn,
    TypeVar,
    Union,
    cast,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro

from nanochat.common import UserError, setup_logging

C = TypeVar("C")
Presets = Mapping[str, Mapping[str, Mapping[str, Any]]]  # flag -> its value -> field -> value


class _Rest:
    """Marks the field that takes the words behind a bare `--`."""


Rest = Annotated[tuple[str, ...], _Rest, tyro.conf.Suppress]

_TRUE = {"true", "1", "yes", "on"}
_FALSE = {"false", "0", "no", "off"}
# What a full disk or a folder of somebody else's raises; the message already names the file.
_USER_OS_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS}
# What writing to standard output raises when its place is full, closed or broken.
_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EBADF, errno.EIO}


class UsageError(UserError):
    """The command line is wrong; exit code 2."""


@dataclasses.dataclass(frozen=True)
class _Flag:
    """One field of the config: its flag, other spellings, and the plain type inside it."""

    name: str  # with dashes, without the leading ones
    aliases: tuple[str, ...]
    kind: Any  # the type without Annotated and None
    takes_none: bool
    positional: bool

    @property
    def shown(self) -> str:
        """As it is written in messages."""
        return self.name if self.positional else f"--{self.name}"

    @property
    def takes_many(self) -> bool:
        return get_origin(self.kind) in (list, tuple, set)


def parse(config_type: type[C], argv: Sequence[str] | None = None) -> C:
    """Build a `config_type` from command line arguments (default: sys.argv[1:]).

    Raises UsageError (a UserError) naming the flag, the value and what is possible.
    `--help` prints the help and raises SystemExit(0).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    flags = _flags_of(config_type)
    presets: Presets = getattr(config_type, "PRESETS", {})
    rest_field, rest = _rest_field(config_type), []
    if rest_field and "--" in arguments:
        place = arguments.index("--")
        arguments, rest = arguments[:place], arguments[place + 1 :]
    config: Any = tyro.cli(
        config_type,
        args=_normalised(arguments, flags, presets),
        prog=_program_name(),
        config=(tyro.conf.OmitArgPrefixes,),
    )
    if rest_field:
        config = dataclasses.replace(config, **{rest_field: tuple(rest)})
    return cast(C, config)


def run(main: Callable[[C], int | None], config_type: type[C]) -> NoReturn:
    """Parse, set up logging, call `main(config)`, exit.

    Exit codes: what `main` returns (None = 0), 2 for a wrong command line, 1 for a UserError,
    which is printed as one line, 130 for Ctrl-C, 141 when nobody reads the output any more.
    Anything else is a defect and keeps its traceback.
    """
    _replace_closed_streams()
    try:
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        config = parse(config_type)
        setup_logging()
        code = main(config) or 0
        sys.stdout.flush()  # here, where a reader that has gone can still be handled
        sys.exit(code)
    except UsageError as error:
        print(f"error: {error} (see {_program_name()} --help)", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        _fail(str(error))
    except BrokenPipeError:
        if not _reader_has_gone():
            raise
        # As in `... | head`; 141 is what a shell shows.
        _drop_output()
        sys.exit(141)
    except OSError as error:
        has_no_name = error.filename is None and error.errno in _OUTPUT_ERRORS
        if has_no_name and (reason := _output_trouble()) is not None:
            _drop_output()
            _fail(f"standard output cannot be written ({reason}); send it somewhere else")
        if error.errno not in _USER_OS_ERRORS:
            raise
        place = f" while writing {error.filename}" if error.filename else ""
        _fail(f"{error.strerror}{place}; free space or choose another NANOCHAT_BASE_DIR")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _replace_closed_streams() -> None:
    """Give standard streams that the caller has closed (`>&-`) a place, where Python has None.

    Input is empty then, messages are lost, and output is an error, but only when there is some.
    """
    # Opened for reading only, which every write to it finds out.
    ways = (("stdin", os.O_RDONLY, "r"), ("stdout", os.O_RDONLY, "w"), ("stderr", os.O_WRONLY, "w"))
    for name, flags, mode in ways:
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, flags)
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _output_trouble() -> str | None:
    """Why standard output cannot be written; None when it can."""
    # Found out without writing: the error does not say whose it is, and may be of another file.
    try:
        sys.stdout.flush()
        descriptor = sys.stdout.fileno()
        os.write(descriptor, b"")  # refused by what is closed and by devices such as /dev/full
    except OSError as error:
        return error.strerror
    is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
    if is_file and os.fstatvfs(descriptor).f_bavail == 0:
        return os.strerror(errno.ENOSPC)
    return None


def _drop_output() -> None:
    """Have what is still buffered for standard output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _reader_has_gone() -> bool:
    """Whether standard output is a pipe that is closed at its other end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(state & (select.POLLERR | select.POLLHUP) for _, state in poll.poll(0))


def _fail(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _program_name() -> str:
    """The command as one types it: `python -m scripts.base_train`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is None:
        return Path(sys.argv[0]).name
    return f"python -m {spec.name.removesuffix('.__main__')}"


# ---- what flags there are ---------------------------------------------------------------------


def _flags_of(config_type: type[Any]) -> list[_Flag]:
    """The flags of a dataclass; those of nested dataclasses are flat beside the others."""
    hints = get_type_hints(config_type, include_extras=True)
    flags: list[_Flag] = []
    for field in dataclasses.fields(config_type):
        hint, markers = _without_annotations(hints[field.name])
        if _Rest in markers:
            continue
        kind, takes_none = _without_none(hint)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            flags.extend(_flags_of(kind))
            continue
        renamed = next((m.name for m in markers if getattr(m, "name", None)), field.name)
        flags.append(
            _Flag(
                name=_dashed(renamed),
                aliases=tuple(
                    alias for m in markers for alias in (getattr(m, "aliases", None) or ())
                ),
                kind=kind,
                takes_none=takes_none,
                positional=any(m is tyro.conf.Positional for m in markers),
            )
        )
    return flags


def _rest_field(config_type: type[Any]) -> str | None:
    """The name of the field that takes what follows a bare `--`, if the command has one."""
    hints = get_type_hints(config_type, include_extras=True)
    found = (name for name, hint in hints.items() if _Rest in _without_annotations(hint)[1])
    return next(found, None)


def _without_annotations(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if get_origin(hint) is Annotated:
        return hint.__origin__, hint.__metadata__
    return hint, ()


def _without_none(hint: Any) -> tuple[Any, bool]:
    if get_origin(hint) not in (Union, types.UnionType):
        return hint, False
    kinds = [kind for kind in get_args(hint) if kind is not type(None)]
    takes_none = len(kinds) < len(get_args(hint))
    return (kinds[0] if len(kinds) == 1 else hint), takes_none


def _dashed(name: str) -> str:
    return name.replace("_", "-")


# ---- from what was typed to what tyro reads ---------------------------------------------------


def _normalised(arguments: list[str], flags: list[_Flag], presets: Presets) -> list[str]:
    """One canonical argument per flag; the last of several wins, presets and file come first."""
    by_spelling = {f"--{flag.name}": flag for flag in flags}
    for flag in flags:
        by_spelling.update({_spelling(alias): flag for alias in flag.aliases})
    if "-h" in arguments or "--help" in arguments:
        return ["--help"]
    has_positionals = any(flag.positional for flag in flags)
    chosen: dict[str, list[str]] = {}
    overrides: list[tuple[_Flag, list[str]]] = []
    positionals: list[str] = []
    tokens = _Tokens(arguments[1:] if arguments[:1] == ["--"] else arguments)
    for token in tokens:
        if not token.startswith("-"):
            if has_positionals:
                positionals.append(token)
            else:
                for flag, value in _read_config_file(token, by_spelling):
                    chosen[flag.name] = _canonical(flag, [value])
            continue
        overrides.append(_read_flag(token, tokens, by_spelling))
    for flag, values in overrides:
        chosen[flag.name] = _canonical(flag, values)
    chosen = _preset_settings(presets, chosen, by_spelling) | chosen
    for flag, value in zip((f for f in flags if f.positional), positionals, strict=False):
        _checked(flag, value)
    return [argument for canonical in chosen.values() for argument in canonical] + positionals


def _preset_settings(
    presets: Presets, chosen: Mapping[str, list[str]], by_spelling: Mapping[str, _Flag]
) -> dict[str, list[str]]:
    """The canonical arguments that the chosen flags stand for."""
    settings: dict[str, list[str]] = {}
    for name, by_value in presets.items():
        flag = by_spelling[f"--{_dashed(name)}"]
        for value, fields in by_value.items():
            if chosen.get(flag.name) == _canonical(flag, [value]):
                for field, literal in fields.items():
                    other = by_spelling[f"--{_dashed(field)}"]
                    settings[other.name] = _canonical(other, [str(literal)])
    return settings


class _Tokens(Iterator[str]):
    """Arguments with a look at the next one."""

    def __init__(self, arguments: Iterable[str]) -> None:
        self._rest = list(arguments)

    def __next__(self) -> str:
        if not self._rest:
            raise StopIteration
        return self._rest.pop(0)

    def peek(self) -> str | None:
        return self._rest[0] if self._rest else None


def _spelling(flag_text: str) -> str:
    """`--max_seq_len` and `--max-seq-len` are the same flag."""
    return "--" + _dashed(flag_text[2:]) if flag_text.startswith("--") else flag_text


def _read_flag(
    token: str, tokens: _Tokens, by_spelling: dict[str, _Flag]
) -> tuple[_Flag, list[str]]:
    """The flag that `token` names and its values, taken from `token` or from what follows."""
    text, equals, value = token.partition("=")
    spelling = _spelling(text)
    flag = by_spelling.get(spelling)
    if flag is None:
        negated = by_spelling.get("--" + spelling.removeprefix("--no-"))
        if negated is not None and negated.kind is bool and not equals:
            return negated, ["False"]
        raise UsageError(_unknown(text, by_spelling))
    if equals:
        return flag, value.split() if flag.takes_many else [value]
    if flag.kind is bool:
        following = tokens.peek()
        if following is not None and following.lower() in _TRUE | _FALSE:
            return flag, [next(tokens)]
        return flag, ["True"]
    if flag.takes_many:
        values = []
        while (following := tokens.peek()) is not None and not _is_flag(following, by_spelling):
            values.append(next(tokens))
        return flag, values
    following = tokens.peek()
    if following is None or _is_flag(following, by_spelling):
        raise UsageError(f"{text} needs a value")
    return flag, [next(tokens)]


def _is_flag(token: str, by_spelling: dict[str, _Flag]) -> bool:
    """Whether a token is a flag, known or not; `-1` and `-some text` can be values."""
    return token.startswith("--") or _spelling(token.partition("=")[0]) in by_spelling


def _unknown(text: str, by_spelling: dict[str, _Flag]) -> str:
    # Compared without the dashes, which every name shares.
    by_name = {spelling.lstrip("-"): spelling for spelling in by_spelling}
    nearest = difflib.get_close_matches(_spelling(text).lstrip("-"), by_name, n=1)
    hint = f"did you mean {by_name[nearest[0]]}?" if nearest else "none has a similar name"
    return f"unknown flag {text}; {hint}"


def _canonical(flag: _Flag, values: list[str]) -> list[str]:
    """The arguments tyro is given for one flag."""
    if flag.takes_many:
        return [f"--{flag.name}", *values]
    value = values[0]
    if flag.takes_none and value == "None":
        return [f"--{flag.name}=None"]
    if flag.kind is bool:
        on = _boolean(flag, value)
        if flag.takes_none:
            return [f"--{flag.name}={on}"]
        return [f"--{flag.name}" if on else f"--no-{flag.name}"]
    return [f"--{flag.name}={_checked(flag, value)}"]


def _boolean(flag: _Flag, value: str) -> bool:
    if value.lower() in _TRUE:
        return True
    if value.lower() in _FALSE:
        return False
    raise UsageError(f"--{flag.name} is on or off, got {value!r}; use --{flag.name}=True or =False")


def _checked(flag: _Flag, value: str) -> str:
    """The value in the spelling of the flag's type, or a sentence about what is wrong."""
    if flag.kind is int:
        return str(_whole_number(flag, value))
    if flag.kind is float:
        try:
            float(value)
        except ValueError:
            raise UsageError(f"{flag.shown} needs a number, got {value!r}") from None
    if get_origin(flag.kind) is Literal:
        choices = [str(choice) for choice in get_args(flag.kind)]
        if value not in choices:
            raise UsageError(f"{flag.shown} is one of {', '.join(choices)}, got {value!r}")
    return value


def _whole_number(flag: _Flag, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        pass
    try:
        number = float(value)
        if number == int(number):
            return int(number)
    except (ValueError, OverflowError):
        pass
    raise UsageError(f"{flag.shown} needs a whole number, got {value!r}")


# ---- config files -----------------------------------------------------------------------------


def _read_config_file(path: str, by_spelling: dict[str, _Flag]) -> list[tuple[_Flag, str]]:
    """The `key = literal` lines of a file. Nothing in it is executed."""
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), filename=path)
    except OSError:
        raise UsageError(f"{path!r} is neither a flag nor a config file that can be read") from None
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UsageError(f"config file {path} cannot be read ({error})") from None
    settings = []
    for statement in tree.body:
        place = f"{path}, line {statement.lineno}"
        if not (
            isinstance(statement, ast.Assign)
            and len(statement.targets) == 1
            and isinstance(statement.targets[0], ast.Name)
        ):
            raise UsageError(f"{place}: only `key = literal` lines are allowed")
        key = statement.targets[0].id
        flag = by_spelling.get(f"--{_dashed(key)}")
        if flag is None:
            raise UsageError(f"{place}: {_unknown('--' + key, by_spelling)}")
        try:
            settings.append((flag, str(ast.literal_eval(statement.value))))
        except ValueError:
            raise UsageError(
                f"{place}: the value of {key} is not a literal (number, string, True, None)"
            ) from None
    return settings
