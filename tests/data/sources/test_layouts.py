"""Each layout of a record gives the document that its owners mean."""

import base64

import numpy as np
import pytest

from chameleon_jax.data.sources.layouts import document_of
from chameleon_jax.errors import DataError
from chameleon_jax.tokens.document import Document, Image
from chameleon_jax.tokens.images import png_bytes

PIXELS = {name: np.full((2, 3, 3), value, np.uint8) for value, name in enumerate(['a.png', 'b.png', 'c.png', 'd.png'])}
A, B, C, D = (Image(pixels) for pixels in PIXELS.values())
BASE64 = base64.b64encode(png_bytes(PIXELS['c.png'])).decode()


def _read(name):
  if name not in PIXELS:
    raise DataError(f'no {name}')
  return PIXELS[name]


LUMINA = {
    'conversations': [
        {'from': 'human', 'value': 'Convert this depth image <|image|> to a color image'},
        {'from': 'gpt', 'value': '<|image|>'},
        {'from': 'human', 'value': 'Now in the style of <|image|>'},
        {'from': 'gpt', 'value': 'Sure. <|image|>'},
    ],
    'image': ['a.png', 'b.png', 'c.png', 'd.png'],
}
LLAVA = {
    'id': 7,
    'image': 'a.png',
    'conversations': [{'from': 'human', 'value': '<image>\nWhat is it?'}, {'from': 'gpt', 'value': 'A cat.'}],
}
MESSAGES = {
    'messages': [
        {'role': 'system', 'content': 'Be brief.'},
        {'role': 'user', 'content': [{'type': 'image'}, {'type': 'text', 'text': 'What?'}]},
        {'role': 'assistant', 'content': 'A cat.'},
        {'role': 'user', 'content': [{'type': 'text', 'text': 'Draw '}, {'type': 'image', 'image': 'c.png'}]},
        {'role': 'assistant', 'content': [{'type': 'image_url', 'image_url': {'url': f'data:image/png;base64,{BASE64}'}}]},
    ],
    'images': ['b.png'],
}


@pytest.mark.parametrize(
    ('record', 'document'),
    [
        ({'segments': ['A cat: ', {'image': 'a.png'}, {'text': '!'}]}, Document.plain('A cat: ', A, '!')),
        ({'segments': [{'image_base64': BASE64}]}, Document.plain(C)),
        ({'segments': [{'image': f'data:image/png;base64,{BASE64}'}]}, Document.plain(C)),
        (
            {'turns': [{'role': 'prompt', 'segments': ['Draw.']}, {'role': 'answer', 'segments': [{'image': 'b.png'}, 'Here.']}]},
            Document.chat('Draw.', [B, 'Here.']),
        ),
        (LUMINA, Document.chat(['Convert this depth image ', A, ' to a color image'], B, ['Now in the style of ', C], ['Sure. ', D])),
        (LLAVA, Document.chat([A, '\nWhat is it?'], 'A cat.')),
        (MESSAGES, Document.chat(['Be brief.', '\n', B, 'What?'], 'A cat.', ['Draw ', C], C)),
        ({'text': 'Draw a cat', 'image': 'a.png', 'aesthetic': 8.4}, Document.plain('Draw a cat', A)),
        ({'caption': 'A cat', 'image_base64': BASE64}, Document.plain('A cat', C)),
        ({'text': 'only text'}, Document.plain('only text')),
        ({'texts': ['one', None, 'two'], 'images': [None, 'b.png', None]}, Document.plain('one', B, 'two')),
    ],
)
def test_layouts(record, document):
  assert document_of(record, _read) == document


@pytest.mark.parametrize(
    ('record', 'message'),
    [
        ([1], 'a record is a JSON object, got a list'),
        ({'foo': 1}, 'no known layout: the keys are foo, known are segments'),
        ({**LUMINA, 'image': ['a.png']}, '1 pictures and 4 places'),
        ({**LLAVA, 'conversations': LLAVA['conversations'][1:]}, '1 pictures and 0 places'),
        ({'conversations': LLAVA['conversations'][1:][::-1]}, r"starts with a prompt and ends with an answer, got \['answer'\]"),
        ({'conversations': [{'from': 'bird', 'value': 'x'}]}, "unknown speaker 'bird'"),
        ({'conversations': []}, "'conversations' must be a list that is not empty"),
        ({'conversations': [{'value': 'x'}]}, "'from' is missing"),
        ({'conversations': [{'from': 'human', 'value': 3}]}, 'text or a list of parts, got a number'),
        ({'messages': [{'role': 'user', 'content': [{'type': 'audio'}]}]}, "type text or image, got 'audio'"),
        ({'segments': [3]}, 'a segment is a string'),
        ({'segments': [{'image': 'https://example.org/a.png'}]}, 'download the pictures first'),
        ({'segments': [{'image_base64': '*'}]}, 'not base64'),
        ({'segments': [{'image': 'zzz.png'}]}, 'no zzz.png'),
        ({'segments': [{'image': 5}]}, 'a picture is a path or base64, got a number'),
        ({'text': 5}, "'text' must be text, got a number"),
        ({'texts': ['a'], 'images': []}, "'images' must be a list"),
        ({'texts': ['a', 'b'], 'images': [None, 'a.png']}, 'place 1 of "texts" and "images" must hold exactly one'),
        ({'texts': ['a'], 'images': [None, 'a.png']}, 'has 1 places and "images" 2'),
        ({'turns': [{'role': 'x', 'segments': ['a']}]}, "unknown role 'x'"),
    ],
)
def test_bad_records(record, message):
  with pytest.raises(DataError, match=message):
    document_of(record, _read)
