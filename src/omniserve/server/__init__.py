"""The OpenAI-compatible server: HTTP, tiers and overload in front of the engine."""
