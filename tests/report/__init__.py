"""Tests of the report: content, escaping, missing parts, the card."""
