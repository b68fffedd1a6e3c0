"""``rlhf-fast serve``: an in-process engine behind the HTTP dialect of OpenAI and vLLM.

``protocol`` is JSON to requests and samples to JSON, ``worker`` the one thread that runs the engine, ``app`` the routes,
``guard`` what keeps strangers out.
"""
