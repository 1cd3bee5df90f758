"""An engine that writes what it is told to: the methods of `engine.Engine`, no network, no device."""

import numpy as np

from chameleon_jax.errors import PromptError
from chameleon_jax.sampling.requests import Progress


class ScriptedEngine:
  """Every request has a script: the tokens it will draw and how it ends, or the line of its PromptError.

  Attributes:
    cancelled: tickets in the order in which they were cancelled.
    submitted: (prompt, options, row) of each request.
    asked: max_steps of each round.
  """

  def __init__(self, scripts):
    self._scripts = list(scripts)
    self._work = {}
    self.cancelled, self.submitted, self.asked = [], [], []

  def submit(self, prompt, options, *, row=0, name='the prompt'):
    place = len(self.submitted)
    self.submitted.append((prompt, options, row))
    script = self._scripts[place]
    if isinstance(script, str):
      raise PromptError(f'{name} {script}')
    ticket = 100 + place
    self._work[ticket] = [list(script[0]), script[1]]
    return ticket

  def cancel(self, ticket):
    self.cancelled.append(ticket)
    if ticket in self._work:
      self._work[ticket] = [[], 'cancelled']

  @property
  def pending(self):
    return bool(self._work)

  def advance(self, max_steps=256):
    self.asked.append(max_steps)
    reports = []
    for ticket, (tokens, end) in list(self._work.items()):
      new, left = tokens[:max_steps], tokens[max_steps:]
      self._work[ticket][0] = left
      finished = None if left else end
      if finished:
        del self._work[ticket]
      reports.append(Progress(ticket, np.array(new, np.int32), finished, 'the logits are not finite' if finished == 'failed' else None))
    return reports
