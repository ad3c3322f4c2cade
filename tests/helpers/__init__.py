"""What several test files use. No test file imports another."""

from pathlib import Path


ROOT = Path(__file__).parents[2]
