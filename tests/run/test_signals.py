"""SIGTERM and Ctrl-C: finish the step, save, leave."""

import os
import signal
import threading

import pytest

from rlhf_fast.run.signals import StopSignals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_the_first_signal_is_a_request(name, capfd):
    before = signal.getsignal(getattr(signal, name))
    with StopSignals() as stop:
        assert not stop.requested
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.requested
        assert stop.name == name
    assert signal.getsignal(getattr(signal, name)) is before
    assert f"{name}: finishing this step, then saving" in capfd.readouterr().err


def test_a_second_ctrl_c_interrupts_and_a_second_sigterm_does_not():
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert stop.name == "SIGTERM"


def test_other_threads_leave_the_handlers_alone():
    handlers = []

    def inside():
        with StopSignals():
            handlers.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert handlers == [before]
