"""The colours of the agents, the same in films and in pictures of masks.

Seven colours of Okabe and Ito's palette, which also colour-blind people can tell apart. They are in an order in which
the first N differ as much as possible, however one sees colours. Their light and dark versions follow: 21 colours.
"""

PALETTE = ("#0072b2", "#d55e00", "#f0e442", "#cc79a7", "#56b4e9", "#e69f00", "#009e73")
NUM_COLOURS = 3 * len(PALETTE)  # from this agent on, the colours repeat


def agent_colour(agent):
    """(red, green, blue) of agent 0, 1, ..., each from 0 to 1."""
    plain = [int(PALETTE[agent % 7][i : i + 2], 16) / 255 for i in (1, 3, 5)]
    towards, share = ((0.0, 0.0), (1.0, 0.5), (0.0, 0.5))[agent // 7 % 3]  # plain, light, dark
    return tuple((1 - share) * x + share * towards for x in plain)
