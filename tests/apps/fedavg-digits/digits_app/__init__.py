"""FedAvg on handwritten digits; clients count their visits, and a mod counts their messages."""
