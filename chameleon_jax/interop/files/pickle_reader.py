"""Reads a pickle as plain data: no import, no call of anything but a few functions the caller hands over.

The standard unpickler is not used. `pickletools.genops` cuts the bytes into opcodes and `read_pickle` runs those that build None, bool,
int, float, str, bytes, tuple, list and dict; sets, byte arrays, text opcodes of protocol 0, extension codes and instances are refused.
A global name is looked up in the caller's table alone, and only a `Function` of that table can be called, with a tuple. So a hostile pickle
has nothing to reach for. What is left, taking much memory or time, is bounded by the number of opcodes and by keys of dicts being scalars.
"""

import dataclasses
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any

MAX_OPS = 8_000_000  # some 25 a tensor; the longest that only builds containers then takes about 1 GB
_KEY_TYPES = (str, int, float, bool, bytes, type(None))
_LITERALS = frozenset(
    [
        *('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
        *('BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8'),
    ]
)
_CONSTANTS: dict[str, Any] = {'NONE': None, 'NEWTRUE': True, 'NEWFALSE': False, 'EMPTY_TUPLE': ()}
_FIXED_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


class PickleRefused(ValueError):
  """A pickle is damaged or asks for something that is not admitted. The one line of its message continues 'FILE: the pickle ...'."""


@dataclasses.dataclass(frozen=True)
class Function:
  """A name that a pickle may call: `call` gets the tuple of arguments, unchecked, and raises `PickleRefused` where they do not fit."""

  name: str
  call: Callable[[tuple], Any]


def brief(value: Any) -> str:
  """A short, one-line account of any value, however large it is."""
  if isinstance(value, (str, bytes)):
    return repr(value[:60]) + ('...' if len(value) > 60 else '')
  return repr(value)[:40] if isinstance(value, (bool, int, float, type(None))) else f'a {type(value).__name__}'


def read_pickle(data: bytes, admitted: Mapping[str, Any], persistent: Callable[[Any], Any]) -> Any:
  """Returns the value that the pickle `data` (protocols 2 to 5) describes.

  Args:
    data: the pickle; bytes after its end are not looked at.
    admitted: 'module name' (one space between) -> what the name stands for: a `Function`, or a value that is put in its place.
    persistent: turns the id of a persistent object into the object; raises `PickleRefused` where it cannot.

  Raises:
    PickleRefused: the pickle is damaged, too large, or uses a name or an opcode that is not admitted.
  """
  machine = _Machine(admitted, persistent)
  try:
    for count, (opcode, argument, position) in enumerate(pickletools.genops(data)):
      if count == 0 and not (opcode.name == 'PROTO' and argument in (2, 3, 4, 5)):
        raise PickleRefused('does not start with a protocol from 2 to 5')
      if count >= MAX_OPS:
        raise PickleRefused(f'is longer than {MAX_OPS} opcodes')
      if opcode.name in _LITERALS:
        machine.stack.append(argument)
      elif opcode.name == 'STOP':
        return machine.pop()
      elif opcode.name not in ('PROTO', 'FRAME'):
        machine.step(opcode.name, argument, position)
  except PickleRefused:
    raise
  except (ValueError, TypeError, LookupError, OverflowError, MemoryError, RecursionError, EOFError, struct.error) as error:
    raise PickleRefused(f'is damaged: {" ".join(str(error).split())[:200] or type(error).__name__}') from error
  raise PickleRefused('is damaged: it has no end')


class _Machine:
  """Stack, marks and memo of one run. `marks` holds stack heights; nothing below the last one can be popped."""

  def __init__(self, admitted: Mapping[str, Any], persistent: Callable[[Any], Any]):
    self.admitted, self.persistent = admitted, persistent
    self.stack: list[Any] = []
    self.marks: list[int] = []
    self.memo: dict[int, Any] = {}

  def pop(self) -> Any:
    self.top()
    return self.stack.pop()

  def top(self) -> Any:
    if len(self.stack) <= (self.marks[-1] if self.marks else 0):
      raise PickleRefused('is damaged: it takes a value that is not there')
    return self.stack[-1]

  def pop_mark(self) -> list[Any]:
    if not self.marks:
      raise PickleRefused('is damaged: it ends a group that was not begun')
    start = self.marks.pop()
    items = self.stack[start:]
    del self.stack[start:]
    return items

  def step(self, op: str, argument: Any, position: int | None) -> None:
    """Runs one opcode that is not a literal."""
    push = self.stack.append
    if op in _CONSTANTS:
      push(_CONSTANTS[op])
    elif op in ('BINPUT', 'LONG_BINPUT', 'MEMOIZE'):
      self.memo[len(self.memo) if op == 'MEMOIZE' else argument] = self.top()
    elif op in ('BINGET', 'LONG_BINGET'):
      if argument not in self.memo:
        raise PickleRefused(f'is damaged: it recalls value {argument}, which it never stored')
      push(self.memo[argument])
    elif op == 'MARK':
      self.marks.append(len(self.stack))
    elif op == 'TUPLE':
      push(tuple(self.pop_mark()))
    elif op in _FIXED_TUPLES:
      items = [self.pop() for _ in range(_FIXED_TUPLES[op])]
      push(tuple(reversed(items)))
    elif op == 'EMPTY_DICT':
      push({})
    elif op == 'EMPTY_LIST':
      push([])
    elif op == 'LIST':
      push(self.pop_mark())
    elif op == 'DICT':
      items = self.pop_mark()
      push({})
      self.set_items(items)
    elif op in ('APPEND', 'APPENDS'):
      items = [self.pop()] if op == 'APPEND' else self.pop_mark()
      self.exactly(list, op).extend(items)
    elif op in ('SETITEM', 'SETITEMS'):
      self.set_items([self.pop(), self.pop()][::-1] if op == 'SETITEM' else self.pop_mark())
    elif op == 'BINPERSID':
      push(self.persistent(self.pop()))
    elif op == 'GLOBAL':
      push(self.find(argument))
    elif op == 'STACK_GLOBAL':
      name, module = self.pop(), self.pop()
      if type(name) is not str or type(module) is not str:
        raise PickleRefused(f'is damaged: it names a global by {brief(module)} and {brief(name)}')
      push(self.find(f'{module} {name}'))
    elif op in ('REDUCE', 'NEWOBJ'):
      arguments, function = self.pop(), self.pop()
      if type(function) is not Function or type(arguments) is not tuple:
        raise PickleRefused(f'calls {brief(function)} with {brief(arguments)}, which is not admitted')
      push(function.call(arguments))
    elif op == 'BUILD':
      state = self.pop()
      if type(state) is not dict:
        raise PickleRefused(f'sets the attributes of {brief(self.top())} to {brief(state)}, which is not admitted')
      self.exactly(dict, op)  # an OrderedDict with attributes, such as the _metadata of a state dict: they are left out
    elif op == 'POP':
      self.pop()
    elif op == 'POP_MARK':
      self.pop_mark()
    elif op == 'DUP':
      push(self.top())
    else:
      raise PickleRefused(f'uses opcode {op} at byte {position}, which is not admitted')

  def exactly(self, kind: type, op: str) -> Any:
    """The value on top of the stack, which must be a list or dict of this run."""
    if type(self.top()) is not kind:
      raise PickleRefused(f'applies {op} to {brief(self.top())}, which is not admitted')
    return self.top()

  def set_items(self, items: list[Any]) -> None:
    target = self.exactly(dict, 'SETITEMS')
    if len(items) % 2:
      raise PickleRefused('is damaged: a dict has a key without a value')
    for key, value in zip(items[::2], items[1::2]):
      if type(key) not in _KEY_TYPES:  # a nested tuple may take for ever to hash
        raise PickleRefused(f'has {brief(key)} as a key of a dict, which is not admitted')
      target[key] = value

  def find(self, name: str) -> Any:
    if name not in self.admitted:
      raise PickleRefused(f'asks for {name.replace(" ", ".")[:160]!r}, which is not on the list of admitted names')
    return self.admitted[name]
