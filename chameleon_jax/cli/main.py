"""`chameleon <command> [flags]`: finds the command, parses its flags, turns errors into one line.

A command is a module of this folder with a docstring, `define_flags()` and `main(argv)`. It is imported only
when asked for, so `chameleon --help` does not wait for jax. This file knows no flag of any command.
"""

import difflib
import errno
import importlib
import os
import sys
from collections.abc import Sequence

from absl import flags

from chameleon_jax.cli import flags as config_flags
from chameleon_jax.cli.compiled import keep_compiled_programs
from chameleon_jax.errors import ChameleonError

# command -> (module in chameleon_jax.cli, what it does)
COMMANDS: dict[str, tuple[str, str]] = {
    'demo': ('demo', 'describe, draw and edit held-out emoji with the shipped weights and write a page'),
    'sample': ('sample', 'continue a prompt with text and pictures'),
    'evaluate': ('evaluate', 'measure a model and print the table'),
    'convert': ('convert', "read and write weights in our form, Meta's and Hugging Face's"),
    'verify': ('verify', 'compare two checkpoints, or one with golden values, and name what differs'),
    'train-image-tokenizer': ('train_image_tokenizer', 'train the VQ-GAN that turns pictures into codes and back'),
    'train-text-tokenizer': ('train_text_tokenizer', 'train the sentencepiece BPE text tokenizer'),
    'tokenize': ('tokenize', 'turn a data set into shards of codes and text'),
    'train': ('train', 'pre-train or fine-tune the transformer'),
    'peek': ('peek', 'show what a step of a training run saw, as a page'),
    'plan': ('plan', 'tell whether a run fits a machine, how fast it goes, and what to change'),
}


def usage() -> str:
  """The text of `chameleon --help`."""
  width = max(map(len, COMMANDS))
  lines = [f'  {name:<{width}}  {what}' for name, (_, what) in COMMANDS.items()]
  head = ['usage: chameleon COMMAND [--flag=value ...]', '', 'commands:']
  return '\n'.join([*head, *lines, '', '`chameleon COMMAND --help` lists the flags of a command.'])


def command_help(command: str, docstring: str, names: Sequence[str]) -> str:
  """The text of `chameleon COMMAND --help`: the module's docstring, its flags, and the fields of its config."""
  lines = [f'usage: chameleon {command} [--flag=value ...]', '', docstring.strip(), '', 'flags:']
  configs = []
  for name in sorted(names):
    flag = flags.FLAGS[name]
    default = '' if flag.default is None else f' (default: {flag.default!r})'
    lines.append(f'  --{"[no]" if flag.boolean else ""}{name}: {flag.help}{default}')
    if isinstance(flag, config_flags.ConfigFlag):
      configs.append(flag)
  for flag in configs:
    lines += ['', f'fields of --{flag.name} ({flag.config_type.__name__}):', config_flags.config_help(flag)]
  return '\n'.join(lines)


def run(argv: Sequence[str]) -> int:
  """Runs one command line (without the program's name); returns the exit code. Errors are not caught here."""
  if not argv or argv[0] in ('-h', '--help', 'help'):
    print(usage())
    return 0 if argv else 2
  if argv[0] == '--version':
    from chameleon_jax import __version__

    print(f'chameleon_jax {__version__}')
    return 0
  command, arguments = argv[0], list(argv[1:])
  if command not in COMMANDS:
    near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.0)
    return _fail(f'unknown command {command!r}; did you mean {near[0]!r}? `chameleon --help` lists the commands', 2)
  module = importlib.import_module(f'chameleon_jax.cli.{COMMANDS[command][0]}')
  before = set(flags.FLAGS)
  try:
    module.define_flags()
    names = sorted(set(flags.FLAGS) - before)
    wants_help = any(argument in ('-h', '-help', '--help') for argument in arguments)
    arguments = [argument for argument in arguments if argument not in ('-h', '-help', '--help')]
    try:
      rest = flags.FLAGS([f'chameleon {command}', *config_flags.take_overrides(arguments)])
    except flags.Error as error:
      return _fail(' '.join(str(error).split()), 2)
    if wants_help:
      print(command_help(command, module.__doc__ or '', names))
      return 0
    return module.main(rest) or 0
  finally:
    # One process may run several commands (tests do), and two commands may share a flag's name.
    for name in set(flags.FLAGS) - before:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()


def _fail(message: str, code: int) -> int:
  print(f'chameleon: {message}\n', end='', file=sys.stderr)  # one write: other hosts may share the terminal
  return code


def main(argv: Sequence[str] | None = None) -> int:
  """The console script: like `run`, with every error a user can mend as one line on stderr.

  Exit codes: 0 done, 1 the input, a file or the disk is at fault, 2 the command line is, 130 interrupted; a training run that
  SIGINT or SIGTERM stopped with a checkpoint exits with 130 or 143.
  `CHAMELEON_TRACEBACK=1` lets errors through with their traceback.
  """
  keep_compiled_programs()
  try:
    return run(sys.argv[1:] if argv is None else argv)
  except KeyboardInterrupt:
    return _fail('interrupted', 130)
  except BrokenPipeError:
    # The reader of our output (head, less) has gone; point stdout elsewhere so that Python's own flush stays quiet.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
  except ChameleonError as error:
    if os.environ.get('CHAMELEON_TRACEBACK'):
      raise
    return _fail(' '.join(str(error).split()), error.exit_code)
  except OSError as error:
    if os.environ.get('CHAMELEON_TRACEBACK'):
      raise
    where = f': {error.filename}' if error.filename else ''
    if error.errno == errno.ENOSPC:
      return _fail(f'the disk is full{where}; free some space and run again, the last checkpoint is intact', 1)
    return _fail(f'{error.strerror or error}{where}', 1)


if __name__ == '__main__':
  sys.exit(main())
