"""Catch: a ball falls through a 10 x 5 board, a paddle at the bottom catches it or does not."""

import numpy as np

__all__ = ["Catch"]


class Catch:
    """An episode of nine moves: actions left, stay, right; reward +1 for the caught ball, -1 for the missed one, 0 before.

    The ball starts in a random column of the top row and falls a row a move; the paddle starts in the middle of the bottom row and
    stays on the board. The observation is the board, uint8 [10, 5], 1 where ball and paddle are. The best return is 1, random play
    has -0.6.

    Example:
        >>> env = Catch()
        >>> env.reset(seed=0).sum(), env.step(1)[1:]
        (2, (0.0, False, False))
    """

    observation_shape, observation_dtype, actions = (10, 5), np.dtype(np.uint8), 3

    def reset(self, seed: int) -> np.ndarray:
        """Begin the episode that `seed` fixes; its first observation."""
        self._ball = [0, int(np.random.default_rng(seed).integers(5))]
        self._paddle = 2
        return self._board()

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool]:
        """(observation, reward, terminated, truncated) after one move."""
        self._paddle = min(max(self._paddle + action - 1, 0), 4)
        self._ball[0] += 1
        over = self._ball[0] == 9
        reward = 0.0 if not over else 1.0 if self._ball[1] == self._paddle else -1.0
        return self._board(), reward, over, False

    def _board(self) -> np.ndarray:
        board = np.zeros(self.observation_shape, np.uint8)
        board[tuple(self._ball)] = board[9, self._paddle] = 1
        return board
