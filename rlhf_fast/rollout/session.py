"""The scheduler behind the slot engine and its server: requests come in at any time, each step gives live ones a token.

    with engine.session() as session:
        key = session.add(request)                  # any time between steps
        while not session.idle:
            for writing in session.step():          # every sample that just gained a token
                writing.key, writing.index          # which request, which of its n samples
                writing.sample.ids[-1], writing.sample.logprobs[-1]
                if writing.sample.finish_reason: ...  # "stop" or "length": complete; "" while it goes on
        session.cancel(key)                         # drops what has not finished, and frees its slots

One thread drives a session, and an engine has one session at a time. It holds the policy in generation mode, under the
role of the engine, until it is closed: weights may not change while it is open.
"""
