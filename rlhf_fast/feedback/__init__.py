"""Where labels come from: people, an AI judge, a constitution."""
