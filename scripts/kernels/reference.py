"""TTT-Linear in NumPy: what the kernels must compute, for one sequence and all its heads (docs/backward.md 3).

`rounding=bf16` rounds where the kernels round (W, M and the scaled inner gradients as operands, the update's operand); `exact` does
not. Shapes: q, k, v, dz [H, T, d]; lr [H, T]; tok [K]; gamma, beta [H, d]; W [H, d, d]; b [H, d]; rows [H, phase, 2 d].
"""
import numpy as np

EPS = 1e-6


def exact(x):
    return x


def bf16(x):
    """Nearest even, of the f32 value."""
    u = np.ascontiguousarray(x, np.float32).view(np.uint32).astype(np.uint64)
    u = ((u + 0x7FFF + ((u >> 16) & 1)) >> 16 << 16).astype(np.uint32)
    return u.view(np.float32).astype(np.float64)


def _t(a):
    return np.swapaxes(a, -1, -2)


def _mean(a):
    return a.mean(-1, keepdims=True)


def _normalize(z):
    centred = z - _mean(z)
    rs = 1 / np.sqrt(_mean(centred * centred) + EPS)
    return centred * rs, rs


def _inner(k, v, gamma, beta, W, b, rnd):
    xhat, rs = _normalize(k @ rnd(W) + b[:, None])
    e = gamma * xhat + beta - (v - k)
    g = gamma * e
    m = _mean(g * xhat)
    return rs * (g - _mean(g) - xhat * m), xhat, rs, e, m


def forward(q, k, v, lr, tok, gamma, beta, W, b, phase=0, rows=None, rounding=exact, keep=True):
    """-> dict(z, W, b, rows, ghat, states): the weights at the last boundary, the open rows [H, n, 2 d], the scaled inner gradients
    of the T tokens and the weights at the start of each mini-batch."""
    H, T, d = q.shape
    K, rnd = len(tok), rounding
    gamma, beta = gamma[:, None], beta[:, None]
    W, b = W.copy(), b.copy()
    open_k = rows[:, :phase, :d] if phase else np.zeros((H, 0, d))
    open_g = rows[:, :phase, d:] if phase else np.zeros((H, 0, d))
    z, ghat, states, at = np.empty_like(q), np.empty_like(q), [], 0
    while at < T:
        first = open_k.shape[1]
        n = min(K - first, T - at)
        new = slice(at, at + n)
        states.append((W.copy(), b.copy()))
        G = _inner(k[:, new], v[:, new], gamma, beta, W, b, rnd)[0]
        ghat[:, new] = rnd(lr[:, new, None] * G)
        open_k = np.concatenate([open_k, k[:, new]], 1)
        open_g = np.concatenate([open_g, ghat[:, new]], 1)
        M = rnd(np.tril(q[:, new] @ _t(open_k) + 1, first))
        zbar = q[:, new] @ rnd(W) + b[:, None] - tok[first:first + n, None] * (M @ open_g)
        z[:, new] = q[:, new] + gamma * _normalize(zbar)[0] + beta
        if first + n == K:
            update = rnd(tok[K - 1] * open_g)
            W = W - _t(open_k) @ update
            b = b - update.sum(1)
            open_k, open_g = open_k[:, :0], open_g[:, :0]
        at += n
    return dict(z=z, W=W, b=b, rows=np.concatenate([open_k, open_g], -1), ghat=ghat, states=states)


def backward(q, k, v, lr, tok, gamma, beta, states, ghat, dz, dW, db, rounding=exact):
    """All gradients of a sequence from phase 0, from those of z and of the weights at its last boundary."""
    H, T, d = q.shape
    K, rnd = len(tok), rounding
    gamma, beta = gamma[:, None], beta[:, None]
    dW, db = dW.copy(), db.copy()
    dq, dk, dv, dlr = np.empty_like(q), np.empty_like(q), np.empty_like(q), np.empty_like(lr)
    dtok, dgamma, dbeta = np.zeros((H, K)), np.zeros((H, d)), np.zeros((H, d))
    for i in reversed(range(len(states))):
        s = slice(i * K, min((i + 1) * K, T))
        n = s.stop - s.start
        (W, b), qs, ks, tau, r = states[i], q[:, s], k[:, s], tok[:n, None], lr[:, s, None]
        G, xhat, rs, e, m = _inner(ks, v[:, s], gamma, beta, W, b, rnd)
        Gh = ghat[:, s]
        M = np.tril(qs @ _t(ks) + 1)
        xo, rso = _normalize(qs @ rnd(W) + b[:, None] - tau * (rnd(M) @ Gh))
        p = dz[:, s] * gamma
        dzbar = rnd(rso * (p - _mean(p) - xo * _mean(p * xo)))
        N = np.tril(dzbar @ _t(Gh))
        dtok[:, :n] -= (M * N).sum(-1)
        dM = rnd(-tau * N)
        dGh = -_t(M) @ (tau * dzbar)
        dqs = dz[:, s] + dzbar @ _t(rnd(W)) + dM @ ks
        dks = _t(dM) @ qs
        if n == K:
            P = ks @ rnd(dW) + db[:, None]
            dtok[:, K - 1] -= (P * Gh).sum((-1, -2))
            dGh = dGh - tok[K - 1] * P
            dks = dks - tok[K - 1] * (Gh @ _t(rnd(dW)))
        dlr[:, s] = (dGh * G).sum(-1)
        dG = r * dGh
        a1, a2, a3 = _mean(dG), _mean(dG * xhat), _mean(dG * G)
        u = rs * (dG - a1 - a2 * xhat)
        de = gamma * u
        h = gamma * de - rs * (m * dG + a2 * gamma * e)
        dZ = rnd(rs * (h - _mean(h) - xhat * (_mean(h * xhat) + a3)))
        dq[:, s], dv[:, s] = dqs, -de
        dk[:, s] = dks + dZ @ _t(rnd(W)) + de
        dgamma += (dz[:, s] * xo + u * e + de * xhat).sum(1)
        dbeta += (dz[:, s] + de).sum(1)
        dW = dW + _t(qs) @ dzbar + _t(ks) @ dZ
        db = db + (dzbar + dZ).sum(1)
    return dict(dq=dq, dk=dk, dv=dv, dlr=dlr, dtok=dtok, dgamma=dgamma, dbeta=dbeta, dW=dW, db=db)
