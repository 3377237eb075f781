"""`kernels benchmark`: log-probabilities of 4,096 tokens under Llama-3-8B's head.

The reference is torch in the same precision, by way of logits in float32; in half precision it
would be up to 0.2 nats off, which the runner takes for a failure.
"""

import torch
from kernels.benchmark import Benchmark


class LogProbabilities(Benchmark):
    seed = 0

    def setup(self):
        # A CPU interprets the kernels: enough to see that this runs.
        sizes = (16, 64, 1009) if self.device == "cpu" else (4096, 4096, 128256)
        rows, hidden_size, vocabulary = sizes
        how = {"device": self.device, "dtype": torch.bfloat16}
        self.hidden = torch.randn(rows, hidden_size, **how)
        self.weight = torch.randn(vocabulary, hidden_size, **how) * hidden_size**-0.5
        self.targets = torch.randint(0, vocabulary, (rows,), device=self.device)
        self.epilogue = self.kernel.Epilogue()

    def setup_rows(self):
        self.setup()
        self.products = self.logits()

    def logits(self):
        if self.device == "cuda":
            return torch.mm(self.hidden, self.weight.T, out_dtype=torch.float32)
        return self.hidden.float() @ self.weight.float().T

    def benchmark_projection(self):
        given = self.hidden, self.weight, self.targets, self.epilogue
        self.out = self.kernel.projection_statistics(*given)[0]

    def verify_projection(self):
        return self.log_probabilities(self.logits())

    def benchmark_rows(self):
        self.out = self.kernel.row_statistics(self.products, self.targets, self.epilogue)[0]

    def verify_rows(self):
        return self.log_probabilities(self.products)

    def log_probabilities(self, logits):
        return logits.log_softmax(-1).gather(-1, self.targets[:, None]).squeeze(-1)
