"""TTT-MLP in NumPy: what the kernels must compute, for one sequence and all its heads (docs/backward.md 4).

`rounding=bf16` rounds where the kernels round, `exact` does not. Shapes: q, k, v, dz [H, T, d]; lr [H, T]; tok [K]; gamma, beta
[H, d]; W = (W1 [H, d, f], b1 [H, f], W2 [H, f, d], b2 [H, d]); rows [H, phase, 2 d + 2 f], [k | Ĝ1 | X2 | Ĝ2] of each token.
"""
import numpy as np

from reference import _mean, _normalize, _t, exact

C, A = 0.7978845608028654, 0.044715


def gelu(x):
    """gelu (tanh form), its first and second derivative."""
    th = np.tanh(C * x * (1 + A * x * x))
    sech2, kappa = 1 - th * th, C * (1 + 3 * A * x * x)
    return 0.5 * x * (1 + th), 0.5 * (1 + th) + 0.5 * x * sech2 * kappa, sech2 * (C * (1 + 6 * A * x * x) - x * th * kappa * kappa)


def _inner(k, v, gamma, beta, z2):
    xhat, rs = _normalize(z2)
    e = gamma * xhat + beta - (v - k)
    g = gamma * e
    m = _mean(g * xhat)
    return rs * (g - _mean(g) - xhat * m), xhat, rs, e, m


def forward(q, k, v, lr, tok, gamma, beta, W, phase=0, rows=None, rounding=exact):
    """-> dict(z, W, rows, g1, g2, sums, states): the weights at the last boundary, the open rows, the scaled inner gradients and
    [Z2 | Z̄2] of the T tokens, and the weights at the start of each mini-batch."""
    H, T, d = q.shape
    f, K, rnd = 4 * d, len(tok), rounding
    gamma, beta = gamma[:, None], beta[:, None]
    W1, b1, W2, b2 = (w.copy() for w in W)
    cut = np.cumsum([d, f, f])
    if phase:
        ok, o1, ox, o2 = np.split(rows[:, :phase], cut, -1)
    else:
        ok, o1, ox, o2 = (np.zeros((H, 0, n)) for n in (d, f, f, d))
    z, g1, g2, sums = np.empty_like(q), np.empty((H, T, f)), np.empty_like(q), np.empty((H, T, 2 * d))
    states, at = [], 0
    while at < T:
        first = ok.shape[1]
        n = min(K - first, T - at)
        new = slice(at, at + n)
        states.append((W1, b1, W2, b2))
        r1, r2, tau, r = rnd(W1), rnd(W2), tok[first:first + n, None], lr[:, new, None]
        y, d1, _ = gelu(k[:, new] @ r1 + b1[:, None])
        x2 = rnd(y)
        z2 = x2 @ r2 + b2[:, None]
        G2 = _inner(k[:, new], v[:, new], gamma, beta, z2)[0]
        g2[:, new] = rnd(r * G2)
        g1[:, new] = rnd(r * (rnd(G2) @ _t(r2)) * d1)
        ok, ox = np.concatenate([ok, k[:, new]], 1), np.concatenate([ox, x2], 1)
        o1, o2 = np.concatenate([o1, g1[:, new]], 1), np.concatenate([o2, g2[:, new]], 1)
        M1 = rnd(np.tril(q[:, new] @ _t(ok) + 1, first))
        xbar = rnd(gelu(q[:, new] @ r1 + b1[:, None] - tau * (M1 @ o1))[0])
        M2 = rnd(np.tril(xbar @ _t(ox) + 1, first))
        zbar = xbar @ r2 + b2[:, None] - tau * (M2 @ o2)
        sums[:, new] = np.concatenate([z2, zbar], -1)
        z[:, new] = q[:, new] + gamma * _normalize(zbar)[0] + beta
        if first + n == K:
            u1, u2 = rnd(tok[K - 1] * o1), rnd(tok[K - 1] * o2)
            W1, b1, W2, b2 = W1 - _t(ok) @ u1, b1 - u1.sum(1), W2 - _t(ox) @ u2, b2 - u2.sum(1)
            ok, o1, ox, o2 = (x[:, :0] for x in (ok, o1, ox, o2))
        at += n
    return dict(z=z, W=(W1, b1, W2, b2), rows=np.concatenate([ok, o1, ox, o2], -1), g1=g1, g2=g2, sums=sums, states=states)


def backward(q, k, v, lr, tok, gamma, beta, states, g1, g2, dz, dW, rounding=exact):
    """All gradients of a sequence from phase 0, from those of z and of the weights at its last boundary."""
    H, T, d = q.shape
    K, rnd = len(tok), rounding
    gamma, beta = gamma[:, None], beta[:, None]
    dW1, db1, dW2, db2 = (w.copy() for w in dW)
    dq, dk, dv, dlr = np.empty_like(q), np.empty_like(q), np.empty_like(q), np.empty_like(lr)
    dtok, dgamma, dbeta = np.zeros((H, K)), np.zeros((H, d)), np.zeros((H, d))
    for i in reversed(range(len(states))):
        s = slice(i * K, min((i + 1) * K, T))
        n = s.stop - s.start
        W1, b1, W2, b2 = states[i]
        qs, ks, tau, r, dzs, h1, h2 = q[:, s], k[:, s], tok[:n, None], lr[:, s, None], dz[:, s], g1[:, s], g2[:, s]
        r1, r2 = rnd(W1), rnd(W2)
        y, d1, d2 = gelu(ks @ r1 + b1[:, None])
        x2 = rnd(y)
        G2, xhat, rs, e, m = _inner(ks, v[:, s], gamma, beta, x2 @ r2 + b2[:, None])
        U = rnd(G2) @ _t(r2)
        M1 = np.tril(qs @ _t(ks) + 1)
        y, dbar1, _ = gelu(qs @ r1 + b1[:, None] - tau * (rnd(M1) @ h1))
        xbar = rnd(y)
        M2 = np.tril(xbar @ _t(x2) + 1)
        xo, rso = _normalize(xbar @ r2 + b2[:, None] - tau * (rnd(M2) @ h2))
        p = dzs * gamma
        dzbar2 = rnd(rso * (p - _mean(p) - xo * _mean(p * xo)))
        N2 = np.tril(dzbar2 @ _t(h2))
        dtok[:, :n] -= (M2 * N2).sum(-1)
        dM2 = rnd(-tau * N2)
        dh2 = -_t(M2) @ (tau * dzbar2)
        dx2 = _t(dM2) @ xbar
        dzbar1 = rnd((dzbar2 @ _t(r2) + dM2 @ x2) * dbar1)
        N1 = np.tril(dzbar1 @ _t(h1))
        dtok[:, :n] -= (M1 * N1).sum(-1)
        dM1 = rnd(-tau * N1)
        dh1 = -_t(M1) @ (tau * dzbar1)
        dq[:, s] = dzs + dzbar1 @ _t(r1) + dM1 @ ks
        dks = _t(dM1) @ qs
        if n == K:
            rd1, rd2, tl = rnd(dW1), rnd(dW2), tok[K - 1]
            P1, P2 = ks @ rd1 + db1[:, None], x2 @ rd2 + db2[:, None]
            dh1, dh2 = dh1 - tl * P1, dh2 - tl * P2
            dks = dks - tl * (h1 @ _t(rd1))
            dx2 = dx2 - tl * (h2 @ _t(rd2))
            dtok[:, K - 1] -= (P1 * h1).sum((-1, -2)) + (P2 * h2).sum((-1, -2))
        dlr[:, s] = (dh1 * U * d1).sum(-1) + (dh2 * G2).sum(-1)
        dg1, dg2 = r * dh1, r * dh2
        dU = rnd(dg1 * d1)
        dg2 = dg2 + dU @ r2
        a1, a2, a3 = _mean(dg2), _mean(dg2 * xhat), _mean(dg2 * G2)
        u = rs * (dg2 - a1 - a2 * xhat)
        de = gamma * u
        h = gamma * de - rs * (m * dg2 + a2 * gamma * e)
        dz2 = rnd(rs * (h - _mean(h) - xhat * (_mean(h * xhat) + a3)))
        dz1 = rnd((dx2 + dz2 @ _t(r2)) * d1 + dg1 * U * d2)
        dv[:, s] = -de
        dk[:, s] = dks + dz1 @ _t(r1) + de
        dgamma += (dzs * xo + u * e + de * xhat).sum(1)
        dbeta += (dzs + de).sum(1)
        dW1 = dW1 + _t(qs) @ dzbar1 + _t(ks) @ dz1
        db1 = db1 + (dzbar1 + dz1).sum(1)
        dW2 = dW2 + _t(xbar) @ dzbar2 + _t(x2) @ dz2 + _t(dU) @ rnd(G2)
        db2 = db2 + (dzbar2 + dz2).sum(1)
    return dict(dq=dq, dk=dk, dv=dv, dlr=dlr, dtok=dtok, dgamma=dgamma, dbeta=dbeta, dW=(dW1, db1, dW2, db2))
