"""Packaging of chameleon_jax. Ranges, not pins: each lower bound is the oldest release the tests ran with.

Python 3.11 ends at jax 0.10.2; 3.12 and 3.13 get jax 0.12.
"""

import pathlib
import re

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
JAX = 'jax>=0.10.2,<0.13'

setup(
    name='chameleon-jax',
    version=re.search(r"^__version__ = '([^']+)'", (ROOT / 'chameleon_jax' / '__init__.py').read_text(), re.MULTILINE)[1],
    description='Chameleon in JAX: mixed-modal early-fusion models that read and write text and pictures in any order',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    license_files=['LICENSE'],
    python_requires='>=3.11,<3.14',
    packages=find_packages(include=['chameleon_jax', 'chameleon_jax.*']),
    package_data={'chameleon_jax': ['assets/**/*', 'assets/**/.*', 'py.typed']},
    install_requires=[
        JAX,
        'flax>=0.12.8,<0.13',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.8,<0.13',
        'grain>=0.2.18,<0.3',
        'array-record>=0.8.3,<0.9',
        'tensorflow-datasets>=4.9.10,<5',
        'importlib_resources>=6.4',  # tensorflow-datasets imports it but does not ask for it on Python 3.9 and later
        'sentencepiece>=0.2.1,<0.3',
        'tokenizers>=0.21,<1',  # the released text tokenizer
        'pyyaml>=6',  # vqgan.yaml of the release
        'absl-py>=2.1,<3',
        'ml_collections>=1.0,<2',
        'pillow>=11,<14',
        'numpy>=2.0,<3',
        'ml_dtypes>=0.5',  # bfloat16 in files read without jax
        'jaxtyping>=0.3.2,<0.4',
        'tensorboardX>=2.6.2,<3',
    ],
    extras_require={
        'cuda': [JAX.replace('jax', 'jax[cuda12]', 1)],
        'tpu': [JAX.replace('jax', 'jax[tpu]', 1)],
        'serve': [],  # nothing beyond the core; the name is kept so that install lines stay valid
        'eval': [],  # the same
        'parity': ['torch==2.13.0', 'transformers>=5.17,<6', 'safetensors>=0.5'],  # for tests against other implementations
        'beam': ['apache-beam>=2.70,<3'],  # `chameleon tokenize` on a cluster
        'dev': [
            'pytest>=8',
            'ruff>=0.9',
            'mypy>=1.14',
            'beartype>=0.20',
            'nbformat>=5.10',
            'nbclient>=0.10',
            'ipykernel>=6.29',
            'matplotlib>=3.9',  # tools/plot_metrics.py
            'emoji==2.16.0',  # the names that tools/build_emoji_world.py reads; another release would build another world
            'fonttools>=4.50',
            'uharfbuzz>=0.40',
        ],
    },
    entry_points={'console_scripts': ['chameleon = chameleon_jax.cli.main:main']},
    classifiers=[
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
    ],
)
