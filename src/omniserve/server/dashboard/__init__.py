"""The live page: what it shows (page.html), what the server keeps for it, and the routes it asks."""
