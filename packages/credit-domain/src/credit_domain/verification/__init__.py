"""The proof that a converted model computes what the unsharded one does, and the name of what does not."""

from credit_domain.verification.report import Difference, VerificationReport
from credit_domain.verification.verify import verify_domain_parallel

__all__ = ["Difference", "VerificationReport", "verify_domain_parallel"]
