"""``rlhf-fast serve``: the slot engine behind the HTTP dialect of OpenAI and vLLM.

``protocol`` is JSON to requests, ``answer`` samples to JSON, ``worker`` the one thread that runs the engine, ``app`` the
routes, ``guard`` what keeps strangers out.
"""
