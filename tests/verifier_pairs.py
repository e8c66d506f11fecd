"""More pairs, one a line as `answer | truth`: forms of right answers, and attempts to fool.

The table holds both signs of each kind in balance; these lists hold what came up beside it.
"""

RIGHT = r"""
$ 9 $ | 9
$$ 9 $$ | 9
$ x = 9 $ | 9
$ (1, 2) $ | (1,2)
\( 9 \) | 9
\[ \frac12 \] | 0.5
\boxed{ \frac{\sqrt{3}}2 } | \frac{\sqrt{3}}{2}
$\boxed{9}$ | 9
(0, +\infty) | (0, \infty)
(-\infty, 0) \cup (0, +\infty) | (-\infty,0)\cup(0,\infty)
[2,+∞) | x \geq 2
-\frac12x + 3 | -1/2x + 3
y=-\frac{1}{2}x+3 | y = -1/2x + 3
\frac 12 | 1/2
\frac12 | 1/2
\frac{1}2 | 1/2
\frac1{2} | 1/2
\frac{\sqrt3}{2} | \frac{\sqrt{3}}{2}
\frac{\sqrt 3}{2} | \frac{\sqrt{3}}{2}
\sqrt{\frac{3}{2}} | \sqrt{\frac32}
P(1,2) | P(1, 2)
A(-1, 0) and B(3, 0) | A(-1,0), B(3,0)
(-1, 0), (3, 0) | A(-1,0), B(3,0)
C(1/2, 3) | (0.5, 3)
A'(2, 3) | A'(2,3)
\pm\frac{1}{2} | \frac12, -\frac12
x=±3 | x = 3 or x = -3
x=±3 | x=-3, x=3
±√2 | \pm\sqrt{2}
3, -3 | x=±3
x_1=2, x_2=3 | x_1 = 2, x_2 = 3
x = 2 or 3 | x = 2 or x = 3
\cos B = \frac{4}{5} | 4/5
\sin\angle A = 0.6 | 3/5
\sin A = \dfrac{3}{5} | \frac35
\angle ABC = 40° | 40
m\angle B = 40^{\circ} | 40°
|BC| = 2\sqrt{5} | \sqrt{20}
S_{△ABC} = 6 | 6
S_{ABC} = 6 | S_{\triangle ABC} = 6
S = 6 | 6
V = 36\pi | 36\pi
10⁵ | 10^5
3×10⁸ | 3e8
cm² | cm^2
12 cm² | 12 cm^2
H₂SO₄ | H2SO4
H₂SO₄ | H_2SO_4
x \neq -1 | x ≠ -1
x\lt5 | x<5
x ≤ 5 | x \leqslant 5
5 米 | 5 m
5 平方米 | 5 m^2
5 km | 5千米
100 元 | 100
20 人 | 20
35度 | 35°
选 C | C
答案选C | C
故选C | C
ＡＢ | AB
ｘ＝１ | x=1
12:30 PM | 12:30pm
12:30 P.M. | 12:30 pm
-(1/2) | -\frac12
-(3/4) | -0.75
+5 | 5
{1,2,3} | 1,2,3
1,2,3 | \{1,2,3\}
\{ 1 , 2 \} | {2,1}
2<x<5 | (2,5)
(2,5) | x \in (2,5)
2 \leq x \leq 5 | [2,5]
x<2 或 x>5 | (-\infty,2)\cup(5,\infty)
\begin{bmatrix}1&2\\3&4\end{bmatrix} | \begin{bmatrix} 1 & 2 \\ 3 & 4 \end{bmatrix}
\begin{pmatrix} 1 \\ 2 \end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\left( \frac{1}{2}, 3 \right) | (1/2, 3)
\frac{x^2}{9}+\frac{y^2}{4}=1 | 4x^2+9y^2=36
(x-1)^2+(y-2)^2=9 | (x - 1)^2 + (y - 2)^2 = 9
y^2 = 4x | y^{2}=4x
\sqrt[3]{2} | 2^{1/3}
2^{\frac{1}{3}} | \sqrt[3]{2}
\ln 2 | \ln(2)
\log_{10} 2 | \log 2
e^{-x} | \frac{1}{e^x}
\sin^2 x + \cos^2 x | 1+0x
2\sin x\cos x | \sin 2x
\tan x | \frac{\sin x}{\cos x}
a^2-b^2 | (a-b)(a+b)
n(n+1)/2 | \frac{n(n+1)}{2}
\frac{n(n+1)}{2} | \frac{n^2+n}{2}
\frac{-b\pm\sqrt{b^2-4ac}}{2a} | \frac{-b \pm \sqrt{b^2-4ac}}{2a}
4\pi r^2 | 4 \pi r^{2}
\frac{4}{3}\pi r^3 | 4/3 \pi r^3
1+i | i+1
-i | -1i
\frac{1+\sqrt{5}}{2} | \frac12+\frac{\sqrt5}{2}
60 mph | 60 mph
9.8 m/s^2 | 9.8\ \mathrm{m/s^2}
5 N·m | 5 N \cdot m
20 % | 20\%
$1,234.56 | 1234.56
-\$5 | -5
three | 3
Thirteen | 13
The answer is: $\frac{1}{2}$ | 0.5
Final answer: 12 | 12
Therefore, the answer is 12. | 12
So x = 12 | 12
It is 12 cm. | 12 cm
The area of triangle ABC is 12 | 12
A. Red | A
A: Red | A
(A) Red | Red
Option A: Red | A
The correct option is (A). | A
A, B and C | ABC
A,B,C | A, B, C
yes | Yes.
Increasing | increasing
The triangle | triangle
C选项 | C
9.8 m s^{-2} | 9.8 m/s^2
5 \mathrm{~cm} | 5 cm
25~\mathrm{N} | 25 N
3.0 \times 10^{8} \mathrm{~m} / \mathrm{s} | 3.0e8 m/s
\mathbb R | \mathbb{R}
\R | \mathbb{R}
(1,2) U (3,4) | (1,2)\cup(3,4)
∴ 12 | 12
⇒ x = 12 | 12
→ 12 | 12
=> 5 | 5
__12__ | 12
\boxed{__12__} | 12
_yes_ | yes
5 mbar | 5 millibars
2x(x+1) | 2x^2+2x
k(x-1) | kx-k
A. trapezoid | A
B. lies on the line | B
"""

# Right, but refused: each would take a rule that costs more than it wins.
REFUSED = r"""
1 000 | 1000
"""

WRONG = r"""
5 cm^2 | 5 cm
(A) | B
A | A and B
x = 5 or x = 6 | 5
x = 5, y = 6 | 5
5, 5 | 5
{5} | 6
[5] | 5
5 | 5, 5
1/2x | 1/(2x)
1/2\pi | 1/(2\pi)
\frac{1}{2}\pi | 1/(2\pi)
1/2\sqrt{3} | \frac{1}{2\sqrt{3}}
1/2\cos x | \frac{1}{2\cos x}
1/x^2y | \frac{1}{x^2y}
x/2y | \frac{x}{2y}
2^3 | 8
2*4 | 8
16/2 | 8.0001
\sqrt{64} | 8
|8| | 8
--8 | 8
-(-8) | 8
8.0.0 | 8
8e0e0 | 8
8 % of 100 | 8
8 per cent of x | 8
8 times | 8
8x | 8
8 or more | 8
at least 8 | 8
8+ | 8
>8 | 8
<8 | 8
~8? | 8
8 (approx.) 9 | 8
8 not 9 | 8
no 8 | 8
The answer is not 8 | 8
The answer is neither 8 | 8
There are no 8 | 8
It is never 8 | 8
The answer is 8 or 9 | 8
The answer is 8 and 9 | 8
The answer: 8. The answer: 9 | 8
选A和B | A
选A、B | A
不是B | B
答案不是B | B
A或B | A
A或B | AB
AB | BA C
A, B or C | ABC
A or B | AB
A or B or C | ABC
x > 3 and x < 5 | x > 3 or x < 5
x > 3, x < 5 | x > 3 or x < 5
x > 3 or x < 5 | 3 < x < 5
(3, 5) | 3 \le x < 5
(3,5) | (3,5]
5 > x > 3 | 3 > x > 5
3 > x < 5 | 5 < x < 3
x < 3 | x > 3
x \le 3 | x < 3
x < 3 < 5 | x < 3
(2,5) or (5,2) | (2,5)
(2,5), (5,2) | (2,5)
{(2,5)} | (5,2)
P(2,5) | Q(2,5)
P(2,5), Q(5,2) | (2,5)
f(2,5) | (2,5)
2(3,4) | (3,4)
AB = 5 = CD | 5
AB = 5, CD = 6 | 5
\sin x = 1 | \cos x = 1
\sin 2A = 1 | 1/2
\tan^{2} A = 3 | 3
|x| = 5 | 5
|x| = 5 | x = 5
x^2 = 25 | x = 5
2x = 10 | 5
-x = 5 | 5
\sqrt{x} = 5 | 5
\frac{x}{2} = 5 | 5
\lim x = 5 | 6
not x = 5 | 5
y = x | x = 5
x = y | y = 5
±5 | 5
±5 | -5
5 | ±5
±5 | 5, 5
±5, 6 | ±5
\pm 5 \pm 1 | 6
5 ± 1 | 5
5 \pm 0.1 | 5
5 ± 1 | 6
5 ± 1 | 6, 4
H2O | HO2
CO2 | CO
Co | C
H_2O | H_3O
x_1 | x_2
12_8 | 12
12_{8} | 128
a_1 2 | a_{12}
10^5 | 10^{-5}
10⁻⁵ | 10⁵
2³ | 23
2⁻¹ | 21
½ | 1
1½ | 11/2
①② | 12
Ⅱ | III
x ≠ 3 | x = 3
x ≠ 3 | 3
x != 3 | x
12:30 | 12:03
12:30 pm | 12:30 am
12:30 | 30:12
12 : 30 | 2 : 5
5 cm 3 mm | 5 cm
5 cm | 5 mm
5 km/h | 5 m/s
5 m/s/s | 5 m/s
5 m s | 5 m
5 kg m | 5 kg
5 $ | 5 €
$5 | 5 cents
$5 cm | $6
5% | 5 %%
50% off | 50%
5万 | 5
5亿 | 5万
五 | 6
5分 | 5秒
5个 | 5人
5米 | 5厘米
5平方米 | 5米
1,2 | 12
1,23 | 123
1,234 | 1,2,3,4
12,345 | 12
1.5 | 15
.5 | 5
5. | 0.5
0x | 0
x+1 | x + 1 = 0
x+1=0 | x+1
x=1 | x+1
sin x | cos x
\sin x | \sin y
\sin(x)^2 | \sin(x^2)
\log x | \ln x
x' | x
f'(x) | f(x)
\vec{AB} | \vec{BA}
\overline{AB} | AB
\angle ABC | \angle CBA D
\triangle ABC | \triangle DEF
a^b | b^a
ab | ba c
a/b | b/a
(a+b)^2 | a^2+b^2
\sqrt{a+b} | \sqrt{a}+\sqrt{b}
|x| | x
\sqrt{x^2} | x
e | \pi
i | -i
x^{12} | x^1 2
x^12 | x^1 \cdot 2
2x3 | 6x
x 2 | x2
a b | a+b
yes no | yes
true/false | true
Yes, No | Yes
maybe yes | yes
no | yes
not parallel | parallel
the | a
a | the
red blue | red
red/blue | red
red | Red and blue
isosceles or equilateral | isosceles
"A" "B" | A
\boxed{5}\boxed{6} | 5
\boxed{5} or 6 | 5
$5$ or $6$ | 5
$5$, $6$ | 5
$5$6$ | 56
**5** **6** | 5
**5**6 | 5
5! | 5
5!! | 5
{1,2} | {1,2,2}
{1,2,2} | {1,2,3}
{1,1,2} | {1,2,2}
(1,2) | {1,2}
{1,2} | (1,2)
1 or 2 | {1,2}
1 or 2 | 1, 2
2, 1 | 1, 2
{2,1} | 1, 2
[1,2] | 1,2
x=1 or y=2 | x=1 or x=2
x=1, x=2 | x=1
x=1, 2 | x=1
x=1, 2 | x=1 or x=3
\{x|x>3\} | x<3
\{x|x=3\} | 4
\begin{pmatrix}1\\2\end{pmatrix} | \begin{pmatrix}2\\1\end{pmatrix}
\begin{pmatrix}1&2\end{pmatrix} | \begin{pmatrix}1\\2\end{pmatrix}
\begin{vmatrix}1&2\\3&4\end{vmatrix} | \begin{pmatrix}1&2\\3&4\end{pmatrix}
\text{A}\text{B} | A
\text{not }A | A
\frac{1}{2}3 | 13/2
\frac123 | \frac{1}{23}
\frac{1}{2}x | \frac{1}{2x}
1\frac{1}{2} | 1/2
-1\frac{1}{2} | -1/2
-1\frac12 | 1/2
\sqrt23 | \sqrt{2}3
\sqrt[3]{8}x | \sqrt{8}x
\sqrt{2}3 | \sqrt{23}
3.14 | \pi
3.14159265358979 | \pi
22/7 | \pi
0.333333 | 1/3
0.3... | 0.3
0.33.. | 0.33
\infty | -\infty
+\infty | -\infty
(0,+\infty) | (-\infty,0)
nan | nan
inf | inf
5 nan | 5
None | 5
5 or | 6
, | 5
5;6 | 5
5|6 | 5
5&6 | 5
5\\6 | 5
5\ 6 | 56
5\,6 | 56
5 000 | 5
5~6 | 56
5-6 | 5
5 - 6 | 5
5–6 | 5
5...6 | 5
5 to 6 | 5
5→6 | 5
=> 5 | x \ge 5
A. lies. | A
A. trap | A
A) hardly | A
D. the opposite | D
C. refuted | C
A) 排除 | A
A) 以外 | A
u(x+1) | ux+u
p(x-1) | px-p
y(t+1) | yt+y
T(n+1) | Tn+T
V(x+h) | Vx+Vh
"""


def pairs(lines: str) -> list[tuple[str, str]]:
    return [tuple(line.split(" | ")[:2]) for line in lines.strip().split("\n")]
