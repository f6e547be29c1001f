// The mathematics of the explorers, with no page in it. Names, units and the order of arguments are
// the package's: parents first, alpha last, nats. A test holds it against the package.
const qstarCore = (() => {
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  // log(1 + x) - x to relative precision, also where it is about -x^2 / 2 (qstar.gaussian).
  function logLessLinear(x, onePlusX) {
    if (Math.abs(x) >= 0.5) return Math.log(onePlusX) - x;
    const r = x / (2 + x);
    let tail = 0;
    for (let k = 39; k > 1; k -= 2) tail = tail * r * r + 1 / k;
    return 2 * r ** 3 * tail - x * r;
  }

  // The root of an increasing function on (low, high): Newton's steps, kept inside the bracket.
  function root(slopeAndCurvature, low = 0, high = 1) {
    let at = (low + high) / 2;
    for (let pass = 0; pass < 200; pass++) {
      const [slope, curvature] = slopeAndCurvature(at);
      if (slope === 0) return at;
      if (slope < 0) low = at;
      else high = at;
      const step = at - slope / curvature;
      const next = step > low && step < high && pass % 3 < 2 ? step : (low + high) / 2;
      if (Math.abs(next - at) <= 1e-16 || high - low <= 1e-16) return next;
      at = next;
    }
    return at;
  }

  // --- Gaussians in the plane: {mean: [x, y], covariance: [xx, xy, yy]} -------------------------

  // Eigenvalues of [xx, xy, yy], the larger one first, and the angle of its eigenvector.
  function eigen([xx, xy, yy]) {
    const middle = (xx + yy) / 2;
    const half = Math.hypot((xx - yy) / 2, xy);
    return { values: [middle + half, middle - half], angle: Math.atan2(2 * xy, xx - yy) / 2 };
  }

  const determinant = ([xx, xy, yy]) => xx * yy - xy * xy;

  // The pair as a product of axes: on each the teacher is N(0, 1) and the policy N(gap, 1 + excess).
  function axesOf(policy, teacher) {
    const [xx, xy, yy] = teacher.covariance;
    const l00 = Math.sqrt(xx);
    const l10 = xy / l00;
    const l11 = Math.sqrt(yy - l10 * l10);
    const i00 = 1 / l00;
    const i10 = -l10 / (l00 * l11);
    const i11 = 1 / l11;
    const scaled = ([a, b, c]) => [
      i00 * i00 * a,
      i00 * (i10 * a + i11 * b),
      i10 * i10 * a + 2 * i10 * i11 * b + i11 * i11 * c,
    ];
    let { values: excess, angle } = eigen(
      scaled(policy.covariance.map((value, at) => value - teacher.covariance[at])),
    );
    let variance = excess.map((e) => 1 + e);
    if (Math.max(...excess.map(Math.abs)) >= 0.5) {
      const whole = eigen(scaled(policy.covariance));
      const large = whole.values[0];
      angle = whole.angle;
      variance = [large, determinant(policy.covariance) / determinant(teacher.covariance) / large];
      excess = variance.map((v) => v - 1);
    }
    const [x, y] = policy.mean.map((value, at) => value - teacher.mean[at]);
    const [sx, sy] = [i00 * x, i10 * x + i11 * y];
    const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
    return { excess, variance, gap: [cos * sx + sin * sy, cos * sy - sin * sx] };
  }

  const overAxes = ({ excess, variance, gap }, term) =>
    term(excess[0], variance[0], gap[0]) + term(excess[1], variance[1], gap[1]);

  const logPartitionOf = (axes, alpha) =>
    overAxes(axes, (e, v, d) => {
      const [a, b] = [alpha, 1 - alpha];
      const u = a + b * v;
      const [part, less, other] = a < b ? [a, -e / v, 1 / v] : [b, e, v];
      const mix = 1 - part + part * other;
      const spread =
        Math.abs(less) < 0.5
          ? part * logLessLinear(less, other) - logLessLinear(part * less, mix)
          : part * Math.log(other) - Math.log(mix);
      return 0.5 * (spread - (a * b * d * d) / u);
    });

  const slopeOf = (axes, alpha) =>
    overAxes(axes, (e, v, d) => {
      const b = 1 - alpha;
      const u = alpha + b * v;
      const spread =
        Math.abs(e) < 0.5 ? (-b * e * e) / u - logLessLinear(e, v) : e / u - Math.log(v);
      return 0.5 * (spread + d * d * ((alpha / u) ** 2 - (b / u) * ((b * v) / u)));
    });

  const curvatureOf = (axes, alpha) =>
    overAxes(axes, (e, v, d) => {
      const u = alpha + (1 - alpha) * v;
      return 0.5 * (e / u) ** 2 + (d * d * v) / u ** 3;
    });

  // KL(q_alpha || policy) and KL(q_alpha || teacher).
  function klToParents(axes, alpha) {
    const b = 1 - alpha;
    return [
      overAxes(axes, (e, v, d) => {
        const u = alpha + b * v;
        const spread = -logLessLinear((-b * e) / u, 1 / u);
        return 0.5 * (spread + d * d * (b / u) * ((b * v) / u));
      }),
      overAxes(axes, (e, v, d) => {
        const u = alpha + b * v;
        return 0.5 * (((alpha * d) / u) ** 2 - logLessLinear((alpha * e) / u, v / u));
      }),
    ];
  }

  function geometricMean(policy, teacher, alpha) {
    const precisions = [policy, teacher].map(({ covariance: [xx, xy, yy] }, at) => {
      const weight = (at ? 1 - alpha : alpha) / (xx * yy - xy * xy);
      return [weight * yy, -weight * xy, weight * xx];
    });
    const [xx, xy, yy] = precisions[0].map((value, at) => value + precisions[1][at]);
    const [x, y] = [policy, teacher].reduce(
      ([x, y], { mean }, at) => {
        const [a, b, c] = precisions[at];
        return [x + a * mean[0] + b * mean[1], y + b * mean[0] + c * mean[1]];
      },
      [0, 0],
    );
    const whole = xx * yy - xy * xy;
    const covariance = [yy / whole, -xy / whole, xx / whole];
    return {
      mean: [covariance[0] * x + covariance[1] * y, covariance[1] * x + covariance[2] * y],
      covariance,
    };
  }

  // 1 - TV of q_alpha and a parent, by a sum over a grid of the plane: good to about 1e-4.
  function acceptanceOf({ variance, gap }, alpha, parent) {
    const cells = 320;
    const sides = variance.map((v, axis) => {
      const u = alpha + (1 - alpha) * v;
      const laws = [
        [(alpha * gap[axis]) / u, Math.sqrt(v / u)],
        parent === "policy" ? [gap[axis], Math.sqrt(v)] : [0, 1],
      ];
      const low = Math.max(...laws.map(([mean, width]) => mean - 8 * width));
      const high = Math.min(...laws.map(([mean, width]) => mean + 8 * width));
      const step = Math.max(0, high - low) / cells;
      const density = ([mean, width]) =>
        Float64Array.from({ length: cells }, (_, at) => {
          const z = (low + (at + 0.5) * step - mean) / width;
          return (Math.exp(-0.5 * z * z) * step) / (width * Math.sqrt(2 * Math.PI));
        });
      return laws.map(density);
    });
    const [[q0, p0], [q1, p1]] = sides;
    let overlap = 0;
    for (let i = 0; i < cells; i++)
      for (let j = 0; j < cells; j++) overlap += Math.min(q0[i] * q1[j], p0[i] * p1[j]);
    return Math.min(overlap, 1);
  }

  // All that the book says about a pair, at its alpha* and at any other alpha.
  function solveGaussians(policy, teacher) {
    const axes = axesOf(policy, teacher);
    const klPolicyTeacher = klToParents(axes, 1)[1];
    const klTeacherPolicy = klToParents(axes, 0)[0];
    const same = klPolicyTeacher === 0 || klTeacherPolicy === 0;
    const alpha = same ? 0.5 : root((at) => [slopeOf(axes, at), curvatureOf(axes, at)]);
    const chernoff = Math.max(0, -logPartitionOf(axes, alpha));
    return { axes, alpha, chernoff, klPolicyTeacher, klTeacherPolicy };
  }

  // --- Rows of log-probabilities, -Infinity off the support --------------------------------------

  const logsumexp = (values) => {
    const top = Math.max(...values);
    return top === -Infinity ? top : top + Math.log(sum(values.map((x) => Math.exp(x - top))));
  };

  // The shared outcomes: [log policy, log teacher, log-ratio, policy - teacher, teacher].
  function pairOf(logPolicy, logTeacher) {
    const [p, r] = [logPolicy, logTeacher].map((row) => {
      const total = logsumexp(row);
      return row.map((x) => x - total);
    });
    const pair = { outcomes: [], gapOff: 0, teacherOff: 0, onlyPolicy: false, onlyTeacher: false };
    p.forEach((x, at) => {
      const y = r[at];
      if (x > -Infinity && y > -Infinity) {
        const [ratio, teacher] = [x - y, Math.exp(y)];
        const close = Math.abs(ratio) < 1;
        const gap = close ? teacher * Math.expm1(ratio) : Math.exp(x) - teacher;
        pair.outcomes.push([x, y, ratio, gap, teacher]);
      } else {
        pair.gapOff += Math.exp(x) - Math.exp(y);
        pair.teacherOff += Math.exp(y);
        pair.onlyPolicy ||= x > -Infinity;
        pair.onlyTeacher ||= y > -Infinity;
      }
    });
    return pair;
  }

  function logPath({ outcomes }, alpha) {
    const path = outcomes.map(([p, r]) => alpha * p + (1 - alpha) * r);
    return [path, logsumexp(path)];
  }

  function rowSlope(pair, alpha) {
    const [path, logZ] = logPath(pair, alpha);
    if (logZ > -0.5) {
      const terms = path.map((x, at) => Math.exp(x) * pair.outcomes[at][2] - pair.outcomes[at][3]);
      return (sum(terms) - pair.gapOff) / Math.exp(logZ);
    }
    return sum(path.map((x, at) => Math.exp(x - logZ) * pair.outcomes[at][2]));
  }

  function rowCurvature(pair, alpha, slope) {
    const [path, logZ] = logPath(pair, alpha);
    return sum(path.map((x, at) => Math.exp(x - logZ) * (pair.outcomes[at][2] - slope) ** 2));
  }

  function rowLogPartition(pair, alpha) {
    const [path, logZ] = logPath(pair, alpha);
    if (!(logZ > -0.5)) return logZ;
    const gaps = path.map((x, at) => {
      const [, , ratio, gap, teacher] = pair.outcomes[at];
      const close = Math.abs(ratio) < 1;
      const grown = close ? teacher * Math.expm1(alpha * ratio) : Math.exp(x) - teacher;
      return alpha * gap - grown;
    });
    return Math.log1p(-Math.max(0, sum(gaps) + alpha * pair.gapOff + pair.teacherOff));
  }

  function solveRows(logPolicy, logTeacher) {
    const pair = pairOf(logPolicy, logTeacher);
    let [status, alpha] = ["interior", 0.5];
    if (!pair.outcomes.length)
      return { status: "disjoint", alpha: NaN, chernoff: Infinity, klToPolicy: Infinity, klToTeacher: Infinity };
    const close = pair.outcomes.every(
      ([p, r, ratio]) => Math.abs(ratio) <= 4.4e-16 * (1 + Math.abs(p) + Math.abs(r)),
    );
    if (close) status = "degenerate_all";
    else if (pair.onlyPolicy || pair.onlyTeacher) {
      if (rowSlope(pair, 0) > 0) status = "boundary_0";
      else if (rowSlope(pair, 1) < 0) status = "boundary_1";
    }
    if (status.startsWith("boundary")) alpha = Number(status.at(-1));
    if (status === "interior")
      alpha = root((at) => {
        const slope = rowSlope(pair, at);
        return [slope, rowCurvature(pair, at, slope)];
      });
    const slope = rowSlope(pair, alpha);
    const chernoff = Math.max(0, -rowLogPartition(pair, alpha));
    const klToPolicy = Math.max(0, chernoff - (1 - alpha) * slope);
    return { status, alpha, chernoff, klToPolicy, klToTeacher: Math.max(0, chernoff + alpha * slope) };
  }

  // q_alpha as probabilities.
  function rowMean(logPolicy, logTeacher, alpha) {
    const shared = (x, y) => x > -Infinity && y > -Infinity;
    const path = logPolicy.map((x, at) => {
      const y = logTeacher[at];
      return shared(x, y) ? alpha * x + (1 - alpha) * y : -Infinity;
    });
    const logZ = logsumexp(path);
    return path.map((x) => Math.exp(x - logZ));
  }

  // KL(p || q) of probabilities.
  function kl(p, q) {
    const terms = p.map((x, at) => (x > 0 ? x * Math.log(x / q[at]) : 0) - x + q[at]);
    return Math.max(0, sum(terms));
  }

  const overlap = (p, q) => Math.min(1, sum(p.map((x, at) => Math.min(x, q[at]))));

  // --- Samplers: `chance` keeps with a probability and draws from a distribution ----------------

  function residual(draft, target) {
    const excess = target.map((x, at) => Math.max(0, x - draft[at]));
    const total = sum(excess);
    return total > 0 ? excess.map((x) => x / total) : target;
  }

  // One token from `count` candidates. "exact": each is tested against what is missing yet, and so
  // is the last draw. "source": all against the target, which is drawn from at the end (biased).
  // "patched": the same, but for the last draw.
  function pickToken(chance, draft, target, count, rule) {
    let aim = target;
    for (let tested = 1; tested <= count; tested++) {
      const token = chance.draw(draft);
      if (chance.keep(Math.min(1, aim[token] / draft[token]))) return { token, accepted: true, tested };
      if (rule === "exact") aim = residual(draft, aim);
    }
    if (rule === "patched") aim = residual(draft, target);
    return { token: chance.draw(aim), accepted: false, tested: count };
  }

  // A round of speculative decoding where every position has the same pair: the kept drafts, and
  // one token more.
  function verifyBlock(chance, draft, target, gamma) {
    const drafts = Array.from({ length: gamma }, () => chance.draw(draft));
    const tokens = [];
    for (const token of drafts) {
      if (!chance.keep(Math.min(1, target[token] / draft[token])))
        return { tokens: [...tokens, chance.draw(residual(draft, target))], accepted: tokens.length };
      tokens.push(token);
    }
    return { tokens: [...tokens, chance.draw(target)], accepted: gamma };
  }

  // Every outcome of a program of choices with its probability: the code that samples, enumerated.
  function* everyOutcome(program) {
    let script = [];
    for (;;) {
      const path = [];
      let weight = 1;
      const choose = (weights) => {
        const after = path.length < script.length ? script[path.length] : -1;
        const index = path.length < script.length ? after : weights.findIndex((w) => w > 0);
        path.push([index, weights]);
        weight *= weights[index];
        return index;
      };
      const chance = { keep: (p) => choose([1 - p, p]) === 1, draw: choose };
      const outcome = program(chance);
      yield [outcome, weight];
      for (;;) {
        if (!path.length) return;
        const [index, weights] = path.pop();
        const next = weights.findIndex((w, at) => at > index && w > 0);
        if (next < 0) continue;
        script = [...path.map(([taken]) => taken), next];
        break;
      }
    }
  }

  // The distribution of one token under each rule of `pickToken`, in closed form.
  function lawOfRule(draft, target, count, rule) {
    if (rule === "exact") return target;
    const shared = target.map((x, at) => Math.min(x, draft[at]));
    const kept = sum(shared);
    const missed = (1 - Math.min(kept, 1)) ** (rule === "patched" ? count - 1 : count);
    return target.map((x, at) => (kept > 0 ? ((1 - missed) * shared[at]) / kept : 0) + missed * x);
  }

  // A source of choices that a seed fixes (mulberry32).
  function seededChance(seed) {
    let state = seed >>> 0;
    const uniform = () => {
      state = (state + 0x6d2b79f5) >>> 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
    return {
      uniform,
      keep: (p) => uniform() < p,
      draw(law) {
        let left = uniform() * sum(law);
        let last = 0;
        for (let at = 0; at < law.length; at++) {
          if (law[at] <= 0) continue;
          last = at;
          left -= law[at];
          if (left < 0) break;
        }
        return last;
      },
    };
  }

  // --- What a token costs (qstar.decoding.costs) -------------------------------------------------

  const PARENTS = ["policy", "teacher"];
  const other = (parent) => PARENTS[Number(parent === "policy")];
  const powers = (a, most) => sum(Array.from({ length: most }, (_, kept) => a ** kept));

  // Seconds of a forward of `width` positions: `costs[model]` holds them by width.
  function secondsOf(costs, model, width) {
    const seconds = costs[model];
    const widths = Object.keys(seconds).map(Number).sort((a, b) => a - b);
    if (width in seconds || widths.length === 1) return seconds[width] ?? seconds[widths[0]];
    const after = widths.findIndex((w) => w > width);
    const right = after < 0 ? widths.length - 1 : after;
    const [low, high] = [widths[right - 1], widths[right]];
    let slope = (seconds[high] - seconds[low]) / (high - low);
    if (width > high) slope = Math.max(0, slope);
    return seconds[high] + slope * (width - high);
  }

  const overhead = (costs) => costs.overhead ?? 0;
  const plain = (costs) =>
    secondsOf(costs, "policy", 1) + secondsOf(costs, "teacher", 1) + overhead(costs);

  function oneSided(costs, drafter, gamma, acceptance) {
    const round =
      gamma * secondsOf(costs, drafter, 1) + secondsOf(costs, other(drafter), gamma);
    return (round + overhead(costs)) / powers(acceptance, gamma);
  }

  function turns(costs, lengths, first, further, policyRedrafts) {
    const longest = {};
    for (const name of PARENTS)
      longest[name] = sum(Object.entries(lengths[name]).map(([k, p]) => k * p));
    const [tokens, seconds, leave] = [{}, {}, {}];
    for (const proposer of PARENTS) {
      const verifier = other(proposer);
      const policy = policyRedrafts[proposer];
      const kept = [1];
      const most = Math.max(...Object.keys(lengths[proposer]).map(Number));
      for (let k = 1; k <= most; k++)
        kept.push(kept[k - 1] * (k === 1 ? first : further)[proposer]);
      const over = (term) =>
        sum(Object.entries(lengths[proposer]).map(([k, p]) => p * term(Number(k))));
      const allKept = over((k) => kept[k]);
      tokens[proposer] = over((k) => sum(kept.slice(0, k)));
      let next = allKept * (longest[verifier] - 1) * secondsOf(costs, verifier, 1);
      PARENTS.forEach((name, at) => {
        const chance = at ? 1 - policy : policy;
        next += (1 - allKept) * chance * longest[name] * secondsOf(costs, name, 1);
      });
      seconds[proposer] = over((k) => secondsOf(costs, verifier, k + 1)) + next + overhead(costs);
      const redraws = verifier === "policy" ? policy : 1 - policy;
      leave[proposer] = allKept + (1 - allKept) * redraws;
    }
    let weights = PARENTS.map((parent) => leave[other(parent)]);
    if (!weights.some(Boolean)) weights = [1, 1];
    const mean = (of) => sum(PARENTS.map((parent, at) => weights[at] * of[parent]));
    return mean(seconds) / mean(tokens);
  }

  function alternating(costs, gamma, acceptPolicy, acceptTeacher) {
    const accept = { policy: acceptPolicy, teacher: acceptTeacher };
    const length = { [gamma]: 1 };
    const of = (redrafter) => {
      const chance = Number(redrafter === "policy");
      const always = { policy: chance, teacher: chance };
      return turns(costs, { policy: length, teacher: length }, accept, accept, always);
    };
    return Math.min(...PARENTS.map(of));
  }

  function coin(costs, gamma, stay, acceptPolicy, acceptTeacher, acceptCoin) {
    const staying = { policy: stay[0], teacher: stay[1] };
    const accept = (name, weight) => {
      const policy = name === "policy" ? weight : 1 - weight;
      const end = policy > 0.5 ? acceptPolicy : acceptTeacher;
      return acceptCoin + (end - acceptCoin) * Math.abs(2 * policy - 1);
    };
    const [lengths, first, further] = [{}, {}, {}];
    for (const name of PARENTS) {
      const s = staying[name];
      lengths[name] = {};
      for (let k = 1; k <= gamma; k++)
        lengths[name][k] = s ** (k - 1) * (k < gamma ? 1 - s : 1);
      first[name] = accept(name, 1 - staying[other(name)]);
      further[name] = accept(name, s);
    }
    const afresh = (stay[0] + 1 - stay[1]) / 2;
    return turns(costs, lengths, first, further, { policy: afresh, teacher: afresh });
  }

  function third(costs, gamma, acceptance, draftForwards) {
    const verify = sum(PARENTS.map((parent) => secondsOf(costs, parent, gamma + 1)));
    const draft = draftForwards ? draftForwards * secondsOf(costs, "draft", 1) : 0;
    return (draft + verify + overhead(costs)) / powers(acceptance, gamma + 1);
  }

  // How many times faster than `plain`; gamma null for the best of 1 to 8. `accept` by proposer.
  function expectedSpeedup(accept, costs, scheme, gamma = null, stay = [0.5, 0.5]) {
    const seconds = (length) => {
      if (scheme === "one-sided")
        return Math.min(...PARENTS.map((who) => oneSided(costs, who, length, accept[who])));
      if (scheme === "alternating") return alternating(costs, length, accept.policy, accept.teacher);
      if (scheme === "coin")
        return coin(costs, length, stay, accept.policy, accept.teacher, accept.coin);
      if (scheme === "lookup") return third(costs, length, accept.lookup, 0);
      if (scheme === "draft-model") return third(costs, length, accept.draft, length);
      return plain(costs);
    };
    const lengths = gamma === null ? [1, 2, 3, 4, 5, 6, 7, 8] : [gamma];
    return plain(costs) / Math.min(...lengths.map(seconds));
  }

  return {
    acceptanceOf, axesOf, eigen, everyOutcome, expectedSpeedup, geometricMean, kl, klToParents,
    lawOfRule, logPartitionOf, overlap, pickToken, residual, rowMean, seededChance, slopeOf,
    solveGaussians, solveRows, sum, verifyBlock,
  };
})();
