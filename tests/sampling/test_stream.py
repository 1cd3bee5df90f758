"""The iterator of events over a scripted engine: order, batching of pictures, cancelling, failures beside success."""

import gc

import numpy as np
import pytest

from chameleon_jax.chameleon import Chameleon
from chameleon_jax.config import SamplingOptions, VocabularyConfig
from chameleon_jax.errors import ConfigError, DataError, PromptError
from chameleon_jax.sampling.events import Ended, Failed, PictureDone, PictureRows, TextPiece
from chameleon_jax.sampling.requests import Progress
from chameleon_jax.sampling.stream import Stream
from chameleon_jax.tokens.document import Document, Image
from chameleon_jax.tokens.vocabulary import Vocabulary
from tests.sampling.scripted_engine import ScriptedEngine

N = 4
V = Vocabulary(VocabularyConfig(size=8 + 4 + 2 + 2 + 256, n_codes=8, n_sentinels=0, n_reserved=2))
PROMPT = np.array([V.begin_sequence, V.text_start, V.end_turn], np.int32)


class Bytes:
  """One piece a byte."""

  n_pieces = 256

  def encode(self, text):
    return list(text.encode())

  def decode(self, pieces):
    return bytes(pieces).decode('utf-8', 'replace')

  def save(self, path):
    raise NotImplementedError


def text(words):
  return [V.text_start + byte for byte in words.encode()]


def picture(*codes):
  return [V.begin_image, *(int(V.token_of_code[code]) for code in codes)]


class Decoder:
  """Each picture is its first code; remembers how many it was given at once."""

  def __init__(self):
    self.batches = []

  def __call__(self, codes):
    assert codes.dtype == np.int32 and codes.shape[1] == N
    self.batches.append(len(codes))
    return np.broadcast_to(codes[:, :1, None, None], (len(codes), 2, 2, 3)).astype(np.uint8)


def stream(engine, n=None, *, prompts=None, options=SamplingOptions(), **settings):
  prompts = [PROMPT] * n if prompts is None else prompts
  return Stream(engine, prompts, options, vocabulary=V, text_tokenizer=Bytes(), n_image_tokens=N, **settings)


def ends(events):
  return {event.request: getattr(event, 'reason', 'failed') for event in events if isinstance(event, (Ended, Failed))}


def written(events, request):
  return ''.join(event.text for event in events if isinstance(event, TextPiece) and event.request == request)


def test_requests_of_all_kinds_together():
  scripts = [
    ([*text('a red apple'), V.end_turn], 'stop'),
    ([*text('see '), *picture(1, 2, 3, 4), V.end_image, *text('!'), V.end_sequence], 'stop'),
    (picture(5, 6, 7, 0)[1:], 'picture'),
    (text('so long'), 'length'),
    ([], 'length'),
  ]
  engine = ScriptedEngine(scripts)
  events = list(stream(engine, 5, decode=Decoder(), max_steps=3))
  assert ends(events) == {0: 'stop', 1: 'stop', 2: 'picture', 3: 'length', 4: 'length'}
  assert [written(events, request) for request in range(5)] == ['a red apple', 'see !', '', 'so long', '']
  for request, (tokens, _) in enumerate(scripts):
    own = [event for event in events if event.request == request]
    assert [type(event) for event in own].count(Ended) == 1 and isinstance(own[-1], Ended)
    assert own[-1].tokens.tolist() == tokens
  documents = {event.request: event.document for event in events if isinstance(event, Ended)}
  assert documents[1].text == 'see !' and [type(p) for p in documents[1].pictures] == [Image]
  assert documents[2].pictures == (Image(np.full((2, 2, 3), 5, np.uint8)),)
  assert engine.asked[0] == 3 and engine.cancelled == []
  assert [row for _, _, row in engine.submitted] == [0, 1, 2, 3, 4]


def test_pictures_due_together_are_decoded_together():
  engine = ScriptedEngine([(picture(code, 1, 2, 3), 'length') for code in range(6)])
  decoder = Decoder()
  events = list(stream(engine, 6, decode=decoder, preview_every=1, max_steps=3))  # 2 codes, then 2 more
  assert decoder.batches == [6, 6]
  assert [int(event.preview[0, 0, 0]) for event in events if isinstance(event, PictureRows)] == list(range(6))
  assert [int(event.image[0, 0, 0]) for event in events if isinstance(event, PictureDone)] == list(range(6))


def test_events_come_between_the_rounds_of_the_engine():
  engine = ScriptedEngine([(text('abcdef'), 'length')])
  events = iter(stream(engine, 1, max_steps=2))
  assert next(events) == TextPiece(0, 'ab') and len(engine.asked) == 1
  assert next(events) == TextPiece(0, 'cd') and len(engine.asked) == 2


def test_cancelling_one_leaves_the_others_as_they_are():
  scripts = [(text('first first'), 'stop'), (text('second second'), 'stop'), ([*picture(1, 2, 3)], 'length')]
  alone = list(stream(ScriptedEngine(scripts), 3, max_steps=2))
  engine = ScriptedEngine(scripts)
  with stream(engine, 3, max_steps=2) as running:
    events = [next(running)]
    running.cancel(1)
    events += list(running)
  assert ends(events) == {0: 'stop', 1: 'cancelled', 2: 'length'} and engine.cancelled == [101]
  for request in (0, 2):
    assert [repr(e) for e in events if e.request == request] == [repr(e) for e in alone if e.request == request]
  cut = next(event for event in events if isinstance(event, Ended) and event.request == 1)
  assert cut.document.text == written(events, 1) == 'se'


def test_cancelling_what_has_ended_does_nothing_and_what_is_not_there_is_an_error():
  engine = ScriptedEngine([(text('a'), 'stop'), (text('b' * 99), 'stop')])
  running = stream(engine, 2, max_steps=2)
  assert next(running) == TextPiece(0, 'a')
  running.cancel(0)
  assert engine.cancelled == []
  with pytest.raises(PromptError, match='no request 2 to cancel; they are 0 to 1'):
    running.cancel(2)
  assert ends(list(running)) == {0: 'stop', 1: 'stop'}


def test_leaving_the_loop_cancels_everything():
  engine = ScriptedEngine([(text('a' * 50), 'stop'), (text('b' * 50), 'stop')])
  running = stream(engine, 2, max_steps=2)
  for _ in running:
    break
  assert engine.cancelled == [100, 101]
  assert list(running) == []


@pytest.mark.parametrize('way', ['close', 'with', 'forgotten', 'error in the block'])
def test_other_ways_to_leave(way):
  engine = ScriptedEngine([(text('a' * 50), 'stop')])
  running = stream(engine, 1, max_steps=2)
  next(running)
  if way == 'close':
    running.close()
    running.close()
  elif way == 'with':
    with running:
      pass
  elif way == 'error in the block':
    with pytest.raises(KeyError), running:
      raise KeyError
  del running
  gc.collect()
  assert engine.cancelled == [100]


def test_an_error_of_the_engine_cancels_and_comes_through():
  engine = ScriptedEngine([(text('a' * 50), 'stop')])
  running = stream(engine, 1, max_steps=2)
  next(running)
  engine.advance = lambda max_steps: 1 / 0
  with pytest.raises(ZeroDivisionError):
    next(running)
  assert engine.cancelled == [100] and list(running) == []


def test_malformed_requests_fail_alone():
  engine = ScriptedEngine([(text('fine'), 'stop'), 'has 99 tokens; shorten it', (text('xy'), 'failed')])
  prompts = [PROMPT, PROMPT, DataError('text holds a lone surrogate'), PROMPT]
  events = list(stream(engine, prompts=prompts, max_steps=64))
  failures = {event.request: event.message for event in events if isinstance(event, Failed)}
  assert failures == {1: 'prompt 1 has 99 tokens; shorten it', 2: 'text holds a lone surrogate', 3: 'the logits are not finite'}
  assert written(events, 0) == 'fine' and written(events, 3) == 'xy'
  assert [row for _, _, row in engine.submitted] == [0, 1, 3]  # the others keep their places, hence their seeds


def test_options_for_each_request():
  options = [SamplingOptions(seed=1), SamplingOptions(seed=2)]
  engine = ScriptedEngine([([], 'length')] * 2)
  assert len(list(stream(engine, 2, options=options))) == 2
  assert [option for _, option, _ in engine.submitted] == options
  with pytest.raises(PromptError, match='3 prompts and 2 options'):
    stream(ScriptedEngine([]), 3, options=options)


@pytest.mark.parametrize('settings', [{'max_steps': 0}, {'preview_every': 0}])
def test_settings_out_of_range(settings):
  with pytest.raises(ConfigError, match='must be positive'):
    stream(ScriptedEngine([]), 0, **settings)


def test_no_requests_no_events():
  assert list(stream(ScriptedEngine([]), 0)) == []


def test_an_open_picture_of_the_prompt_is_shown_whole():
  prompt = np.array([V.begin_sequence, *picture(6, 7)], np.int32)
  engine = ScriptedEngine([(picture(1, 2)[1:], 'picture')])
  events = list(stream(engine, prompts=[prompt], decode=Decoder()))
  done = next(event for event in events if isinstance(event, PictureDone))
  assert done.codes.tolist() == [6, 7, 1, 2] and int(done.image[0, 0, 0]) == 6


def test_reports_of_others_are_passed_over_and_lost_ones_end_the_stream():
  engine = ScriptedEngine([(text('ab'), 'stop')])
  inner = engine.advance
  engine.advance = lambda max_steps: [Progress(5, np.array([V.text_start], np.int32)), *inner(max_steps)]
  assert written(list(stream(engine, 1)), 0) == 'ab'
  engine = ScriptedEngine([(text('ab'), 'stop')])
  running = stream(engine, 1)
  engine.advance()  # somebody else takes the reports
  (event,) = list(running)
  assert isinstance(event, Failed) and 'one stream at a time' in event.message


def test_a_model_streams_what_it_generates(tiny_model_folder):
  model = Chameleon.load(tiny_model_folder)
  prompts = [Document.chat('draw'), Document.chat('draw a red apple'), Document.chat('a b ' * 100), Document.chat('a green pear')]
  options = [
    SamplingOptions(max_new_tokens=40, min_images=1, temperature=3.0),
    SamplingOptions(modalities='image', seed=4),
    SamplingOptions(),
    SamplingOptions(modalities='text', max_new_tokens=9),
  ]
  events = list(model.stream(prompts, options, max_steps=5, preview_every=2))
  # A prompt that is too long cannot be generated from; any other keeps the places, and with them the draws, of the rest.
  whole = model.generate([*prompts[:2], Document.chat('a'), prompts[3]], options)
  documents = {event.request: event.document for event in events if isinstance(event, Ended)}
  assert documents == {0: whole[0], 1: whole[1], 3: whole[3]}
  assert [event.request for event in events if isinstance(event, Failed)] == [2]
  assert [written(events, request) for request in (0, 1, 3)] == [whole[request].text for request in (0, 1, 3)]
  shapes = {event.preview.shape for event in events if isinstance(event, PictureRows)}
  assert shapes == {(16, 16, 3)} and sum(isinstance(event, PictureDone) for event in events) >= 2
