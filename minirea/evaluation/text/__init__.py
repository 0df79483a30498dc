"""Haystacks and what is hidden in them: text as token ids, keys and values, documents."""
