"""The paper's own figures, as far as they are at hand: arXiv 2410.09344, numbers of its tables."""

from __future__ import annotations

# Scores in % at p = 0.99 (Tables 1, 2 and 5): Matthews correlation on CoLA, accuracy on SST-2.
ENCODERS = ("SST-2, BERT", "CoLA, BERT", "SST-2, RoBERTa", "CoLA, RoBERTa")
HEADLINE = {
    "unpruned": (90.25, 56.24, 92.09, 62.10),
    "DARE": (51.00, 4.25, 51.81, 7.65),
    "DAREx-q, q_v": (85.64, 48.96, 86.56, 53.58),
    "DAREx-q per layer, q_v": (89.60, 53.12, 90.40, 58.38),
    "DAREx-q, q_e": (85.81, 45.20, 81.05, 52.10),
    "DAREx-q per layer, q_e": (87.39, 51.70, 89.62, 54.43),
    "AdamR-L2, DARE": (88.17, 57.24, 91.95, 59.01),
}

# Mean |Δ| and mean |c| (Table 8), and what the paper says of pruning them.
STATISTICS = {
    "Abel-7B": (7.3e-4, 2.9e-5, "prunes well"),
    "MetaMath-llema-7B": (1.7e-2, 7e-4, "DARE fails above p = 0.1"),
}

# Model -> p -> MB of a CSR file (Table 13); p = 0 is the dense checkpoint. Seconds to load, by p.
STORAGE = {
    "BERT-base": {0.0: 417.7, 0.9: 108.7, 0.99: 11.4, 0.999: 1.7},
    "RoBERTa-base": {0.0: 475.6, 0.9: 102.3, 0.99: 16.2, 0.999: 7.5},
}
LOAD_SECONDS = {0.0: 0.143, 0.9: 0.120, 0.99: 0.035, 0.999: 0.023}
