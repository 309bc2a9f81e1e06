def lines(row, text):
    return len(text.strip().splitlines()) == int(row["answer"])
