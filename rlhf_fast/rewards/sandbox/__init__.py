"""Running code that nobody trusts: guests, how they are started, and the attacks that a sandbox must withstand first."""

from rlhf_fast.rewards.sandbox.launch import Bwrap, Docker, Sandbox
from rlhf_fast.rewards.sandbox.process import Failed, Guest, Limits, SandboxFault
from rlhf_fast.rewards.sandbox.selftest import check_sandbox

__all__ = ["Bwrap", "Docker", "Failed", "Guest", "Limits", "Sandbox", "SandboxFault", "check_sandbox"]
