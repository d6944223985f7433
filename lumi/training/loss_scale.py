"""Loss scaling for training in float16."""


class LossScale:
    """The factor that keeps float16 gradients above underflow (Micikevicius et al. 2018, arXiv:1710.03740).

    A step that overflows halves it; `patience` steps in a row that do not overflow double it. It is always 1
    for other dtypes, which have the range of float32.
    """

    def __init__(self, dtype: str, patience: int = 1000):
        self.enabled, self.patience = dtype == "float16", patience
        self.value, self.good_steps = (2.0**15 if self.enabled else 1.0), 0

    def update(self, finite: bool) -> None:
        """Adapt after a step whose loss and gradients were finite or not."""
        if not self.enabled:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps % self.patience == 0:
            self.value *= 2
